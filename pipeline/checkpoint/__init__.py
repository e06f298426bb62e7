"""Checkpoints of a run: writing, publishing by rename, checking, choosing, listing and deleting them."""
