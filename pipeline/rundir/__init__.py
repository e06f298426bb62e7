"""The run directory: its paths, lock, status, journals, record of the environment, and what all of them say."""
