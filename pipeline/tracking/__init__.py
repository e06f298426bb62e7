"""MLflow as a mirror of the journal."""
