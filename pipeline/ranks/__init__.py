"""Processes of one run: how they start, find each other, agree, are watched and stop."""
