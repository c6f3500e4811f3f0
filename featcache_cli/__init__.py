"""The commands of each program, thin wrappers that print what the libraries return.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""
