"""Per-example losses, weightings, the weighted training step, anchors and averagings.

Loops over data, files and checkpoints are in `train`.
"""
