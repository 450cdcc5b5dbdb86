"""torchvision, which timm needs and `transformers` takes, beside a PyTorch for CPUs.

The package index has it for CUDA. Its operators do not load beside a PyTorch without, and then
its import fails, because it adds to two of them; no test calls one, so declaring them will do.
"""

import importlib.util
import os

from processes import CHEAP_COMPILATION

# Full optimisation, as users have it: SmolLM2 takes long otherwise, and rounding is another one.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(CHEAP_COMPILATION, "")

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
