"""The command line: sub-commands, flags, help and exit codes.

Slow imports happen inside the commands.
"""
