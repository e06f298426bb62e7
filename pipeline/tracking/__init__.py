"""Tracking of a run in MLflow, which gets the rows of the journal.

`mirror.py` sends while a run trains, `sync.py` from another machine, `last_word.py` when nothing else can. All three
send with `sender.py`.
"""
