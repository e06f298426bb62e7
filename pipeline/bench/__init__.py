"""`megabase bench`: time and memory of megabase and its peers, measured in turns on this machine.

`contest.py` decides who runs when, `lab.py` runs and measures, `*_task.py` are the work, `report.py` prints.
"""
