"""The command line: sub-commands, flags, help and exit codes.

What takes long to import is imported when a command runs.
"""
