"""Low-rank adapters (Hu et al. 2022) on the transformer's linear maps.

`nnx.LoRA` wraps one `nnx.Linear`; here the maps of all layers are stacked and scanned over,
so the adapters are stacks too. They are `nnx.LoRAParam`: train them with that as the filter.
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
    """Adds `alpha / rank * x A B` to linear maps of every layer, in place.

    A is random (uniform, as in PEFT), B is zero: the model computes what it did. Adapters
    are float32, whatever the parameters are.

    Args:
      model: changed in place.
      rank, alpha: the paper has 64 and 64 (arXiv:2502.02797).
      rngs: NNX random streams; `params` is used.
      targets: which maps: out of `q k v o gate up down`.

    Raises:
      ValueError: a rank below 1, a target that is unknown or given twice, or adapters that are
        there already.

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
            f"targets are {list(targets)}; they must be out of {list(TARGETS)}, each once"
        )
    # All are checked before any is changed.
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
    """The stack of kernels with the adapters merged in, in the kernels' dtype.

    Args:
      linear: one of the transformer's linear maps, with or without adapters.

    Example:
      >>> from easy_jax.models.transformer_config import TransformerConfig
      >>> model = Transformer(TransformerConfig("llama", vocab=8, embed=4, mlp=8, layers=1,
      ...     heads=1, kv_heads=1, head_dim=4), rngs=nnx.Rngs(0))
      >>> add_adapters(model, rank=2, alpha=4.0, rngs=nnx.Rngs(1))  # B begins as zeros
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
