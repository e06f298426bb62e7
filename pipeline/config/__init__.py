"""Every setting of a run: `schema` defines the typed tree, `keys` its dotted keys, `load` reads and writes it."""
