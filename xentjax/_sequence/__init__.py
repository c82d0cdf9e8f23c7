"""Losses of sequences: sums over all alignments, paths or taggings of a lattice."""
