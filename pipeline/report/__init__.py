"""A run as a page for somebody who was not there: figures, pictures and settings, from the run directory alone."""
