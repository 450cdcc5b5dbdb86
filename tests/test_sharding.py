"""Sharded equals unsharded: losses, a training step, bytes per device, and what is gathered."""

import functools
import itertools
import re
import types

import jax
import numpy as np
import pytest
from flax import nnx

from easy_jax.config import ConfigError, MeshConfig, OptimizerConfig, ResNetConfig
from easy_jax.core import optim
from easy_jax.core.causal_lm import causal_lm_loss
from easy_jax.core.losses import classification_loss
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.data import ArraySource, PackedSource, TokenSource, scoring_loader, training_loader
from easy_jax.models import resnet
from easy_jax.models.modes import eval_mode, train_mode
from easy_jax.models.transformer import Transformer
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.parallel import sharding
from easy_jax.train import forward

SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
FAMILIES = ("resnet", "llama", "gemma2")
ROWS, LENGTH = 8, 16
VOCAB = 64
SIZES = {
    "vocab": VOCAB,
    "embed": 32,
    "mlp": 64,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "query_scale": 0.3,
}


def _mesh(shape):
    devices = jax.devices()[: np.prod(shape)]
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(shape, sharding.AXES, devices=devices, axis_types=auto)


@functools.lru_cache
def _model(family):
    if family == "resnet":
        config = ResNetConfig(width=8, depths=(1, 1))
        return resnet.ResNet(config, 3, rngs=nnx.Rngs(0)), classification_loss
    extra = {"attention_cap": 20.0, "final_cap": 10.0, "windows": (4, None), "tied": True}
    config = TransformerConfig(family, **SIZES, **(extra if family == "gemma2" else {}))
    return Transformer(config, remat="full", rngs=nnx.Rngs(0)), causal_lm_loss


@functools.lru_cache
def _source(family):
    rng = np.random.default_rng(0)
    if family == "resnet":
        image = rng.normal(size=(ROWS, 8, 8, 1)).astype(np.float32)
        return ArraySource({"image": image, "label": rng.integers(0, 3, ROWS).astype(np.int32)})
    lengths = rng.integers(5, 17, ROWS)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, VOCAB, offsets[-1])
    examples = TokenSource(tokens, offsets, rng.integers(1, 4, ROWS))
    return PackedSource(examples, row_length=LENGTH, max_segments=1)


def _losses(family, shape):
    mesh = _mesh(shape)
    model, loss_fn = _model(family)
    graphdef, state = nnx.split(eval_mode(model))
    state = sharding.shard_tree(state, mesh)
    loader = scoring_loader(_source(family), ROWS)
    step = forward.make_score_step(graphdef, loss_fn, mesh)
    ((_, loss_sum, count),) = forward.per_example(step, state, loader, mesh)
    return loss_sum / count


def _trained(family, shape):
    """State before and after a step, and the step's compiled text."""
    mesh = _mesh(shape)
    model, loss_fn = _model(family)
    model = train_mode(model) if family == "resnet" else model
    optimizer = optim.make_optimizer(OptimizerConfig(name="sgd", learning_rate=0.1), 10)
    state = init_train_state(model, optimizer, mesh=mesh)
    weight_N = np.random.default_rng(1).random(ROWS).astype(np.float32)
    (batch,) = training_loader(_source(family), ROWS, epochs=1, seed=0, weight_N=weight_N)
    batch.pop("example_id")
    step = make_train_step(
        nnx.graphdef(model), loss_fn, optimizer, reduction="token_mean", mesh=mesh
    )
    placed = sharding.shard_batch(batch, mesh)
    text = step.lower(state, placed).compile().as_text()
    layout = jax.tree.map(lambda x: x.sharding, state)
    after, metrics = step(state, placed)
    return layout, after, float(metrics["loss"]), text


@functools.lru_cache
def _unsharded(family):
    return _losses(family, (1, 1, 1)), _trained(family, (1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses(family, shape):
    np.testing.assert_allclose(_losses(family, shape), _unsharded(family)[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(family, shape):
    layout, after, loss, text = _trained(family, shape)
    _, expected, expected_loss, _ = _unsharded(family)[1]
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    moved = 0.0
    expected_params = dict(nnx.to_flat_state(expected.params))
    start = dict(nnx.to_flat_state(nnx.state(_model(family)[0], nnx.Param)))
    for path, value in nnx.to_flat_state(after.params):
        alone = np.asarray(expected_params[path][...])
        np.testing.assert_allclose(np.asarray(value[...]), alone, atol=1e-5, err_msg=str(path))
        moved = max(moved, np.abs(alone - np.asarray(start[path][...])).max())
    assert moved > 1e-3
    # What comes out lies as what went in, so that it can be donated to the next step.
    assert jax.tree.map(lambda x: x.sharding, after) == layout
    _check_gathers(text, after.params, family, shape)


def _check_gathers(text, params, family, shape):
    """Parameters are gathered layer by layer; also if XLA combines some, never more than one's."""
    layers = 1 if family == "resnet" else SIZES["layers"]
    stacked = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 3]
    largest = max(leaf.nbytes // layers for leaf in stacked)
    if family != "resnet":  # tokens, too, are gathered, for a loss that is split by vocabulary
        largest = max(largest, 4 * ROWS * LENGTH * SIZES["embed"])
    gathers = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    sizes = [sum(map(_bytes, re.findall(r"f32\[([\d,]*)\]", types))) for types in gathers]
    assert (len(sizes) >= 7) == (shape[1] > 1)  # a layer of a transformer has 7 matrices
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert max(sizes, default=0) <= largest < total / 2


def _bytes(shape):
    return 4 * int(np.prod([int(size) for size in shape.split(",") if size]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_on_a_device(family, shape):
    """All but norms, biases and the classes' few columns divide over fsdp x tensor."""
    optimizer = optim.make_optimizer(OptimizerConfig(name="adamw"), 10)
    state = init_train_state(_model(family)[0], optimizer, mesh=_mesh(shape))
    _, data_fsdp, tensor = shape
    kernels = 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        per_device = {shard.device: shard.data.nbytes for shard in leaf.addressable_shards}
        assert len(set(per_device.values())) == 1
        if leaf.ndim >= 2 and min(leaf.shape[-2:]) > 4 and leaf.size > 500:
            kernels += 1
            assert leaf.nbytes == next(iter(per_device.values())) * data_fsdp * tensor, leaf.shape
    assert kernels >= 9


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_born_in_its_shards(shape):
    mesh = _mesh(shape)
    model, _ = _model("llama")
    init = sharding.jit_init(
        lambda key: nnx.state(Transformer(model.config, rngs=nnx.Rngs(params=key))), mesh
    )
    compiled = init.lower(jax.random.key(0)).compile()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    norms = 4 * SIZES["embed"] * (2 * SIZES["layers"] + 1)  # whole on every device
    share = (total - norms) / (shape[1] * shape[2]) + norms
    memory = compiled.memory_analysis()
    # What comes out is the device's share, and making it never takes the whole.
    assert memory.output_size_in_bytes == pytest.approx(share, rel=0.01)
    assert memory.temp_size_in_bytes <= 2 * share


def test_mesh_of_several_slices():
    assert sharding.hybrid_shape([8, 4, 2], slices=4) == ((2, 4, 2), (4, 1, 1))
    with pytest.raises(ConfigError, match=r"mesh.data is 1; it must be a multiple of the 2 slices"):
        sharding.hybrid_shape([1, 16, 1], slices=2)


def _chips(slices=1):
    """v6e:4x4, as many times as there are slices: what JAX needs to know to arrange them."""
    return [
        types.SimpleNamespace(
            platform="tpu",
            device_kind="TPU v6 lite",
            coords=(x, y, 0),
            core_on_chip=0,
            slice_index=index,
            process_index=index,
        )
        for index, y, x in itertools.product(range(slices), range(4), range(4))
    ]


@pytest.mark.parametrize("sizes", [(1, 16, 1), (4, 4, 1), (2, 8, 1), (2, 2, 4)], ids=str)
def test_an_axis_of_the_torus_can_be_split(sizes):
    found = sharding.arrange(sizes, _chips())
    assert found.shape == sizes
    assert len({chip.coords for chip in found.flat}) == 16


@pytest.mark.parametrize("sizes", [(2, 16, 1), (4, 8, 1), (8, 2, 2)], ids=str)
def test_only_data_crosses_the_slices(sizes):
    found = sharding.arrange(sizes, _chips(slices=2))
    assert found.shape == sizes
    index = np.vectorize(lambda chip: chip.slice_index)(found)
    assert (index[: sizes[0] // 2] == 0).all() and (index[sizes[0] // 2 :] == 1).all()
    assert len({(chip.slice_index, chip.coords) for chip in found.flat}) == 32


class _Device:
    """A device of a process, as a mesh of many sees it."""

    def __init__(self, process):
        self.process_index = process


class _Mesh:
    """A mesh of devices that are not here: its shape, and whose they are."""

    def __init__(self, processes):
        self.devices = np.vectorize(_Device, otypes=[object])(np.array(processes))
        self.shape = dict(zip(sharding.AXES, self.devices.shape, strict=True))


@pytest.mark.parametrize(
    ("processes", "rows", "owned"),
    [
        ([[[0]], [[1]], [[0]], [[1]]], [0, 1, 4, 5], [True] * 4),  # not a block
        ([[[0, 1], [1, 0]]], [0, 1, 2, 3, 4, 5, 6, 7], [True] * 8),  # both need all
        ([[[1, 1], [0, 0]]], [4, 5, 6, 7], [True] * 4),
        ([[[1, 1], [1, 2]]], [], []),
    ],
)
def test_rows_of_a_process(processes, rows, owned):
    mesh = _Mesh(processes)
    assert sharding.process_rows(8, mesh).tolist() == rows
    assert sharding.owned_rows(8, mesh).tolist() == owned


def test_one_process_of_several_reports_a_row(monkeypatch):
    mesh = _Mesh([[[0, 1], [1, 2], [2, 2], [0, 2]]])
    reports = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows = sharding.process_rows(8, mesh)
        reports += rows[sharding.owned_rows(8, mesh)].tolist()
    assert sorted(reports) == list(range(8))


def test_mesh_config_that_does_not_fit():
    with pytest.raises(ConfigError, match="do not multiply to the 8 available devices"):
        sharding.make_mesh(MeshConfig(data=3))
