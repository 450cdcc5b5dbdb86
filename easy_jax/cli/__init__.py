"""The command line: sub-commands, flags, help and exit codes.

Slow modules are imported inside the commands.
"""
