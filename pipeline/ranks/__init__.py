"""The processes of a run: how they start, meet, exchange decisions, report errors, are watched and stop."""
