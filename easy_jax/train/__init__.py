"""Scoring into a loss table, the training loop, its checkpoints, and evaluation.

Which of them run in what order is in `experiments`.
"""
