"""The index of a shard set: where every segment lies, and verified reads of byte ranges, local and remote."""
