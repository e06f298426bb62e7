"""Using a trained model: export its weights."""
