"""Sequence files to WebDataset shards: records, splits, the writer, and where a killed prepare goes on."""
