"""Fast code behind plain functions: fused cross-entropy, attention, convolution.

Layers with parameters are in `models`.
"""
