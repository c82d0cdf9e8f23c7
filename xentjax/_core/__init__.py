"""Mathematics without opinions: what every loss stands on. Imports jax alone."""
