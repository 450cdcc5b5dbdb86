"""Compiling for TPUs that are not there: does it fit, and what does a step cost."""
