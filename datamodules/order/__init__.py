"""Which windows exist, and the order in which training reads them: pure functions of numbers."""
