"""A window of an epoch becomes tokens, labels and weights."""
