"""Compilation for TPUs that this machine does not have: whether steps fit, and their cost."""
