"""The commands of `megabase`, one file each: `add(parser)` declares the arguments, `run(options)` does the work.

These files import no torch at the top, because the command line is parsed, and signals are handled, before torch loads.
"""
