"""Flax NNX models: residual networks, transformers and LoRA.

`easy_jax.pretrained` loads and exports pre-trained weights.
"""
