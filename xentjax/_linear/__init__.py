"""Losses of a linear layer, computed without storing the logits of all examples at once."""
