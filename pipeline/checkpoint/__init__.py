"""Checkpoints: write, publish by rename, verify, choose, keep and delete."""
