"""Flax NNX models: residual networks, transformers, LoRA. Weights of others are in `pretrained`."""
