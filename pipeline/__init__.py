"""What users run: configuration, training, checkpoints, tracking, submission. Knows `models` and `datamodules`."""
