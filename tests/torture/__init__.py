"""A training run is killed again and again; it must end as the run that nothing disturbed. See __main__.py."""
