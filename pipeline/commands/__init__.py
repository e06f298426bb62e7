"""The commands of `megabase`, one file each: `add(parser)` declares the arguments, `run(options)` does the work.

These files import no torch at the top: the command line is parsed, and signals are listened to, before that.
"""
