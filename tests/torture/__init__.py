"""A training run is killed again and again and must end with the result of an undisturbed run. See __main__.py."""
