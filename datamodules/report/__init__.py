"""Describes a shard set, and computes the Markov baselines that a trained model must beat."""
