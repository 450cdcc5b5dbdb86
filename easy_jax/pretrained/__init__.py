"""Checkpoints of other libraries, in and out: Hugging Face transformers, timm and torchvision.

Safetensors only, never pickle. The models themselves are in `models`.
"""
