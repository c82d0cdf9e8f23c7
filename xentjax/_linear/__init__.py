"""Losses of a linear layer, computed without holding all of its logits."""
