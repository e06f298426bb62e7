"""The typed tree of every setting, how files and arguments fill it, and what is checked before a run starts."""
