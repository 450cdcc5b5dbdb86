"""Scoring into a loss table, the training loop, its checkpoints, and evaluation.

`experiments` runs them in order.
"""
