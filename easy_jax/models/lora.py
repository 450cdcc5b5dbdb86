"""Low-rank adapters (LoRA, Hu et al. 2022) for the transformer's linear maps.

`nnx.LoRA` wraps one `nnx.Linear`. Here the kernels of all layers are stacked and scanned over, so
adapters are stacked too. Adapters are of type `nnx.LoRAParam`; use that type as the filter of
trainable parameters.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from easy_jax.models.transformer import Linear, Transformer

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def add_adapters(
    model: Transformer,
    *,
    rank: int,
    alpha: float,
    rngs: nnx.Rngs,
    targets: Sequence[str] = TARGETS,
) -> None:
    """Adds low-rank adapters, `alpha / rank * x A B`, to linear maps of every layer, in place.

    A is random (uniform, as in PEFT) and B is zero, so the model's output does not change at first.
    Adapters are float32, whatever the dtype of the parameters.

    Args:
      model: the model to change.
      rank, alpha: rank and scale of the adapters; both are 64 in arXiv:2502.02797.
      rngs: NNX random streams; `params` is used.
      targets: the linear maps to adapt, a subset of `q k v o gate up down`.

    Raises:
      ValueError: the rank is below 1, a target is unknown or repeated, or a target has adapters
        already.

    Example:
      >>> from easy_jax.models.transformer_config import TransformerConfig
      >>> model = Transformer(TransformerConfig("llama", vocab=8, embed=4, mlp=8, layers=1,
      ...     heads=1, kv_heads=1, head_dim=4), rngs=nnx.Rngs(0))
      >>> add_adapters(model, rank=2, alpha=2.0, rngs=nnx.Rngs(1), targets=["q"])
      >>> model.blocks[0].q.lora_b.shape
      (1, 2, 1, 4)
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets or len(set(targets)) < len(targets):
        raise ValueError(
            f"targets are {list(targets)}; each must be one of {list(TARGETS)}, without repeats"
        )
    # Check all targets before changing any.
    for name in targets:
        if any(getattr(block, name).lora_a is not None for block in model.blocks):
            raise ValueError(f"{name} has adapters already")
    for block in model.blocks:
        for name in targets:
            linear: Linear = getattr(block, name)
            groups = linear.kernel.shape[0]
            inputs, outputs = dict(linear.inputs), dict(linear.outputs)
            shape = (groups, *inputs.values(), rank)
            bound = math.prod(inputs.values()) ** -0.5
            linear.lora_a = nnx.LoRAParam(
                jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound),
                logical_axes=("layers", *inputs, "rank"),
            )
            linear.lora_b = nnx.LoRAParam(
                jnp.zeros((groups, rank, *outputs.values()), jnp.float32),
                logical_axes=("layers", "rank", *outputs),
            )
            linear.lora_scale = alpha / rank


def merged_kernel(linear: Linear) -> jax.Array:
    """Returns the stack of kernels with the adapters merged in, in the kernels' dtype.

    Args:
      linear: a linear map of the transformer, with or without adapters.

    Example:
      >>> from easy_jax.models.transformer_config import TransformerConfig
      >>> model = Transformer(TransformerConfig("llama", vocab=8, embed=4, mlp=8, layers=1,
      ...     heads=1, kv_heads=1, head_dim=4), rngs=nnx.Rngs(0))
      >>> add_adapters(model, rank=2, alpha=4.0, rngs=nnx.Rngs(1))  # B is initialised to zero
      >>> layer = model.blocks[0].q
      >>> bool((merged_kernel(layer) == layer.kernel[...]).all())
      True
    """
    kernel = linear.kernel[...]
    if linear.lora_a is None or linear.lora_b is None:
        return kernel
    a, b = linear.lora_a[...], linear.lora_b[...]
    update = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)
    return (kernel.astype(jnp.float32) + linear.lora_scale * update).astype(kernel.dtype)
