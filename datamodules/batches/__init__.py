"""Reads windows and makes batches of tokens, labels and weights."""
