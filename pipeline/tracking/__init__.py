"""Tracking of a run in MLflow, which gets the rows of the journal."""
