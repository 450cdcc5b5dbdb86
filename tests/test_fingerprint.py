"""Fingerprints of sources, values and models."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Records

from easy_jax.config import MeshConfig
from easy_jax.data import ArraySource, DataError, fingerprint
from easy_jax.io import fingerprint as fingerprints
from easy_jax.parallel import sharding

RECORDS = [{"x": np.float32(i), "y": np.int32(i % 2)} for i in range(4)]


def edited(position, **fields):
    return [{**record, **fields} if i == position else record for i, record in enumerate(RECORDS)]


def test_fingerprint_of_a_source_does_not_depend_on_the_order_of_the_fields():
    turned = [{"y": record["y"], "x": record["x"]} for record in RECORDS]
    assert fingerprint(Records(RECORDS)) == fingerprint(Records(turned))
    arrays = {"x": np.arange(4.0), "y": np.arange(4)}
    backwards = dict(reversed(arrays.items()))
    assert fingerprint(ArraySource(arrays)) == fingerprint(ArraySource(backwards))


@pytest.mark.parametrize(
    "other",
    [
        edited(2, x=np.float32(2.0000002)),
        edited(2, x=np.float64(2)),
        edited(3, y=np.int32(0)),
        [RECORDS[1], RECORDS[0], *RECORDS[2:]],
        RECORDS[:3],
        [*RECORDS, RECORDS[0]],
        [{"z": record["x"], "y": record["y"]} for record in RECORDS],
        [{"x": record["x"][None], "y": record["y"]} for record in RECORDS],
    ],
    ids=["value", "dtype", "label", "order", "shorter", "longer", "name", "shape"],
)
def test_fingerprint_of_a_source_depends_on_its_content(other):
    assert fingerprint(Records(RECORDS)) != fingerprint(Records(other))
    stacked, changed = (
        ArraySource({name: np.stack([r[name] for r in records]) for name in records[0]})
        for records in (RECORDS, other)
    )
    assert fingerprint(stacked) != fingerprint(changed)


def test_fingerprint_of_any_dtype():
    for dtype in (jnp.bfloat16, np.float16, np.uint8, bool, "datetime64[D]", "S4", "U4"):
        one, same, other = (
            ArraySource({"x": np.array(values).astype(dtype)})
            for values in ([1, 0, 1], [1, 0, 1], [1, 1, 1])
        )
        assert fingerprint(one) == fingerprint(same)
        assert fingerprint(one) != fingerprint(other)


def test_fingerprint_does_not_hash_addresses():
    # An array of Python objects holds pointers, which are others in every process.
    source = ArraySource({"text": np.array(["one", "two"], dtype=object)})
    with pytest.raises((TypeError, DataError), match=r"'text' .*object"):
        fingerprint(source)


def test_fingerprint_of_json_does_not_depend_on_the_order_of_the_keys():
    one = {"a": 1, "b": {"c": [1, 2], "d": None}}
    two = {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert fingerprints.of_json(one) == fingerprints.of_json(two)
    assert fingerprints.of_json(one) != fingerprints.of_json({**one, "a": 2})
    assert fingerprints.of_json([1, 2]) != fingerprints.of_json([2, 1])


# The fingerprint of a model.


SHAPES = {
    "conv": ((3, 3, 2, 8), ("conv_height", "conv_width", "conv_in", "conv_out")),
    "head": ((8, 5), ("features", "classes")),
    "scale": ((1,), ("norm",)),
    "step": ((), None),
}


def small_state(replaced=None):
    """Variables of every rank; `replaced` takes the place of some."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape) for name, (shape, _) in SHAPES.items()}
    values = {name: np.asarray(value, np.float32) for name, value in values.items()}
    return nnx.State(
        {
            name: nnx.Param(jnp.asarray(value), logical_axes=SHAPES[name][1])
            for name, value in (values | (replaced or {})).items()
        }
    )


@pytest.mark.slow
def test_fingerprint_of_a_model_does_not_depend_on_its_sharding():
    state = small_state()
    sharded = sharding.shard_tree(state, sharding.make_mesh(MeshConfig(data=2, fsdp=4)))
    for name in ("conv", "head"):
        shards = sharded[name][...].addressable_shards
        assert len({str(shard.index) for shard in shards}) == 4
    assert fingerprints.of_state(sharded) == fingerprints.of_state(state)
    assert fingerprints.of_state(small_state()) == fingerprints.of_state(state)


@pytest.mark.parametrize("name", SHAPES)
def test_fingerprint_of_a_model_differs_when_one_bit_does(name):
    state = small_state()
    seen = {fingerprints.of_state(state)}
    size = state[name][...].size
    for place, bit in ((0, 0), (size // 2, 17), (size - 1, 31)):
        value = np.array(state[name][...])
        value.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
        seen.add(fingerprints.of_state(small_state({name: value})))
    assert len(seen) == 4


def test_fingerprint_of_a_model_depends_on_dtype_shape_and_name():
    value = np.zeros((8, 5), np.float32)
    states = [
        small_state({"head": value}),
        small_state({"head": value.astype(jnp.bfloat16)}),
        small_state({"head": value.astype(np.int32)}),
        small_state({"head": value.reshape(5, 8)}),
        nnx.State({"body": nnx.Param(jnp.asarray(value))}),
        nnx.State({"tail": nnx.Param(jnp.asarray(value))}),
    ]
    assert len({fingerprints.of_state(state) for state in states}) == len(states)


def test_fingerprint_of_a_model_differs_when_two_values_are_swapped():
    one = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    two = nnx.clone(one)
    two.kernel[...] = two.kernel[...][::-1]
    assert fingerprints.of_state(nnx.state(one)) != fingerprints.of_state(nnx.state(two))
