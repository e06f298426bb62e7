"""The index of a shard set: where every segment lies, and verified reads of its bases, local and remote."""
