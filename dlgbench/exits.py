"""The exit codes of the command line; a signal adds 128 to its number."""

OK = 0
FAILED = 1
"""A trial broke (error, out of memory, timeout) and the others are saved, or no defence will do."""
USAGE = 2
OUT_OF_TIME = 3
BROKEN = 4
"""The environment cannot run reconstructions."""
