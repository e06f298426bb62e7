"""The run directory: its paths, lock, status, journals, and the record of the environment."""
