"""Exporting the weights of a trained model."""
