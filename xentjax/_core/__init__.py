"""Code that all losses share: statistics of logits, derivative rules, masks, checks and mesh axes. It imports only JAX and NumPy."""
