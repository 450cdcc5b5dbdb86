"""Optimised functions: fused cross-entropy, attention, convolution and max pooling.

Layers with parameters are in `models`.
"""
