"""Losses that return one value per example or per element."""
