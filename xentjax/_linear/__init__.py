"""Losses of a linear layer, without its logits."""
