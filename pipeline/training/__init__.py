"""Training: from a checked config to a finished run, with its evaluation, its checks of numbers and its records."""
