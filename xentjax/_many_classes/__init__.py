"""Losses for large numbers of classes: sampled and hierarchical softmax."""
