"""The processes of a run: starting, rendezvous, groups, shared decisions, error reports, watchdog and stopping."""
