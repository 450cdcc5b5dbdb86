"""Fingerprints: short hashes that show whether two artefacts belong together."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_LENGTH = 16  # hex digits: 64 bits


def of_json(value: Any) -> str:
    """Computes the fingerprint of a JSON-serialisable value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Computes the fingerprint of named host arrays, from names, dtypes, shapes and all bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject:
            raise TypeError(f"field {name!r} has dtype object, which has no fingerprint")
        digest.update(f"{name}:{array.dtype.str}:{array.shape}:".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:_LENGTH]


def of_records(records: Iterable[Mapping[str, Any]]) -> str:
    """Computes the fingerprint of a stream of records, which needs a full pass over them."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(of_arrays({name: np.asarray(v) for name, v in record.items()}).encode())
    return digest.hexdigest()[:_LENGTH]


def of_state(state: nnx.State) -> str:
    """Computes the fingerprint of a model, from the path, shape, dtype and content of variables.

    The content is hashed on the devices, in integer arithmetic, so the result does not
    depend on how the state is sharded and no parameters are copied to the host.
    """
    return _of_named(
        (".".join(map(str, path)), variable[...]) for path, variable in nnx.to_flat_state(state)
    )


def of_tree(tree: Any) -> str:
    """Computes the fingerprint of a tree of arrays, as in `of_state`.

    Example:
      >>> of_tree({"a": jnp.zeros(2)}) == of_tree({"a": jnp.zeros(2).at[1].set(-0.0)})
      False
    """
    return _of_named(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    )


def _of_named(named: Iterable[tuple[str, jax.Array]]) -> str:
    digest = hashlib.sha256()
    flat = sorted(named, key=lambda item: item[0])
    for path, value in flat:
        # Waits for each result: on CPUs, several programs with collectives in flight at the same
        # time can deadlock, each waiting for threads that another holds.
        checksum = jax.device_get(_checksum(value))
        digest.update(f"{path}:{value.dtype}:{value.shape}:{checksum[0]}:{checksum[1]};".encode())
    return digest.hexdigest()[:_LENGTH]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Returns two uint32 sums of hashed (index, bits), which do not depend on the sharding."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    bits = bits.astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index * jnp.uint32(bits.shape[axis]) + position
    lanes = [
        jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(salt))), dtype=jnp.uint32)
        for salt in (0x9E3779B9, 0x7F4A7C15)
    ]
    return jnp.stack(lanes)


def _mix(x: jax.Array) -> jax.Array:
    """Hashes uint32 values by a finaliser in which every input bit affects every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)
