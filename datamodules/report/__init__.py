"""What is in a shard set, and the Markov models that a trained model must beat."""
