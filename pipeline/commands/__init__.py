"""The commands of `megabase`, one file each: `add(parser)` declares the arguments, `run(options)` does the work."""
