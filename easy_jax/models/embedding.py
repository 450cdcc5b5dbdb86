"""Embedding lookup in a table whose rows and features are sharded over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from easy_jax.parallel import sharding


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Returns the embeddings of tokens, [B, T, D] in `dtype`.

    On a mesh that shards parameters, each device looks up the features it holds for all rows of its
    `fsdp` group, and an all-to-all then redistributes the results. Only tokens and activations are
    communicated, never the table, and the table's gradient is accumulated in its shards.

    Args:
      table_VD: the embedding table.
      tokens_BT: token ids.
      dtype: dtype of the result.
    """
    mesh = sharding.current_mesh()
    if (
        mesh is None
        or not sharding.splits_parameters(mesh)
        or tokens_BT.shape[0] % sharding.num_shares(mesh)
    ):
        return table_VD[tokens_BT].astype(dtype)

    def on_device(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        tokens_BT = jax.lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
        place_BT = tokens_BT - table_VD.shape[0] * jax.lax.axis_index("tensor")
        here_BT = (place_BT >= 0) & (place_BT < table_VD.shape[0])
        x_BTD = table_VD[jnp.where(here_BT, place_BT, 0)].astype(dtype)
        x_BTD = jax.lax.psum(jnp.where(here_BT[:, :, None], x_BTD, 0), "tensor")
        return jax.lax.all_to_all(x_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        on_device,
        in_specs=(PartitionSpec("tensor", "fsdp"), PartitionSpec(sharding.BATCH, None)),
        out_specs=PartitionSpec(sharding.BATCH, None, None),
    )(table_VD, tokens_BT)
