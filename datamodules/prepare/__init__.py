"""Sequence files to WebDataset shards: reading records, splits, writing shards, continuing after a kill, checking."""
