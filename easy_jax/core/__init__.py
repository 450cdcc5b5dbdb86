"""The method itself: per-example losses, weightings, the weighted step, anchors and averagings.

Loops over data, files and checkpoints are in `train`.
"""
