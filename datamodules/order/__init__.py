"""Which windows exist and in which order they are read: pure functions of numbers."""
