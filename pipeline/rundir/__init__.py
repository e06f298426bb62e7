"""The run directory: its lock, its status, its journals, and the record of the environment."""
