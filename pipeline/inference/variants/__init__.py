"""`megabase variants`: how much less, or more, likely a model finds a sequence with a variant than without it.

`edits` says what a variant changes, `calls` reads them from a VCF, `reading` adds up log-probabilities of pieces of
sequence, `walk` and `windows` read a genome with it, `tasks` shares the work, `null` makes random variants, `columns`
and `write` write results, and `command` puts these together.
"""
