"""torchvision, which timm needs and `transformers` takes, beside a PyTorch for CPUs.

The package index has it for CUDA. Its operators do not load beside a PyTorch without, and then
its import fails, because it adds to two of them; no test calls one, so declaring them will do.
"""

import importlib.util

if importlib.util.find_spec("torchvision") is not None:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
