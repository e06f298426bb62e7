"""What a run will be, by arithmetic alone: parameters, memory, batches, windows, checkpoints. Nothing is started."""
