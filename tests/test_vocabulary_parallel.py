"""The head shared out over devices, and the whole step on a mesh, against one device and NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import devices_mesh
from test_lm_head import _assert_close, _case, _numpy

from easy_jax.config import MeshConfig
from easy_jax.core.causal_lm import causal_lm_loss, causal_lm_token_losses
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.kernels.linear_cross_entropy import (
    NO_TARGET,
    linear_cross_entropy,
    weighted_linear_cross_entropy,
)
from easy_jax.models import lora
from easy_jax.models.transformer import Transformer
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.parallel import sharding
from easy_jax.train.forward import make_score_step

MESHES = ((1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1))


def _mesh(sizes):
    return sharding.make_mesh(MeshConfig(*sizes))


@functools.partial(jax.jit, static_argnames=("cap", "chunk", "mesh"))
def _losses(hidden, head, targets, cotangent, cap=None, chunk=512, mesh=None):
    """Losses, and the gradients of sum(cotangent * loss)."""
    with sharding.tracing_on(mesh):

        def loss(hidden, head):
            options = {"soft_cap": cap, "token_chunk": chunk}
            return linear_cross_entropy(hidden, head, targets, **options)

        nll, vjp = jax.vjp(loss, hidden, head)
        return nll, *vjp(cotangent)


@functools.partial(jax.jit, static_argnames=("cap", "chunk", "mesh"))
def _weighted(hidden, head, targets, weight, cap=None, chunk=512, mesh=None):
    """The weighted sum times 3, and its gradients."""
    with sharding.tracing_on(mesh):

        def loss(hidden, head):
            options = {"soft_cap": cap, "token_chunk": chunk}
            return 3.0 * weighted_linear_cross_entropy(hidden, head, targets, weight, **options)

        total, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
        return total, *gradients


def _on(mesh, case):
    hidden, head, targets, cotangent = case
    rows = sharding.batch_sharding(mesh)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
    hidden, targets, cotangent = jax.device_put((hidden, targets, cotangent), rows)
    return hidden, jax.device_put(head, place), targets, cotangent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "vocab", "cap", "chunk"),
    [
        ((1, 8, 1), 32, None, 512),
        ((1, 8, 1), 36, 1.5, 2),
        ((1, 8, 1), 52, 60.0, 6),
        ((2, 2, 2), 36, 1.5, 2),
        ((2, 2, 2), 32, 1.5, 1),
        ((1, 2, 4), 52, 60.0, 6),
        ((1, 2, 4), 32, None, 512),
        ((8, 1, 1), 36, 1.5, 2),
    ],
)
def test_losses_and_gradients_are_those_of_numpy(sizes, vocab, cap, chunk):
    mesh, case = _mesh(sizes), _case((8, 7), vocab, features=8)
    cotangent = case[3]
    nll, hidden_bar, head_bar = _numpy(*case, cap=cap)
    actual = _losses(*_on(mesh, case), cap=cap, chunk=chunk, mesh=mesh)
    _assert_close(actual, (nll, hidden_bar, head_bar))
    total = 3 * np.sum(np.float64(cotangent) * nll)
    actual = _weighted(*_on(mesh, case), cap=cap, chunk=chunk, mesh=mesh)
    _assert_close(actual, (total, 3 * hidden_bar, 3 * head_bar))


@pytest.mark.parametrize("sizes", MESHES[:2])
@pytest.mark.parametrize("poison", [np.nan, 1e4])
def test_what_lies_at_positions_without_target_does_not_matter(sizes, poison):
    mesh = _mesh(sizes)
    hidden, head, targets, cotangent = _case((8, 7), 32, features=8)
    targets[0] = NO_TARGET
    expected = _numpy(hidden, head, targets, cotangent, cap=1.5)
    hidden[targets == NO_TARGET] = poison
    cotangent[targets == NO_TARGET] = poison
    case = _on(mesh, (hidden, head, targets, cotangent))
    _assert_close(_losses(*case, cap=1.5, chunk=4, mesh=mesh), expected)


@pytest.mark.parametrize("bad", [36, 39, 40, -2])  # on (1, 8, 1): 39 is a row of the padding
def test_a_target_out_of_range_is_nan_for_that_token_only(bad):
    mesh, case = _mesh((1, 8, 1)), _case((8, 7), 36, features=8)
    expected = _numpy(*case)[0]
    case[2][1, 2] = bad
    expected[1, 2] = np.nan
    nll = _losses(*_on(mesh, case), mesh=mesh)[0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
    mesh, case = _mesh((1, 8, 1)), _case((8, 7), 32, features=8, scale=1e4)
    expected = _numpy(*case)[0]
    nll = _losses(*_on(mesh, case), mesh=mesh)[0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-3)


def test_logits_are_computed_once_where_the_weights_are_known():
    """Three matrix products with the head: logits, and the two gradients; a general cotangent
    takes a fourth."""
    mesh, case = _mesh((1, 8, 1)), _case((8, 7), 32, features=8)
    counts = [
        str(jax.make_jaxpr(functools.partial(f, mesh=mesh))(*case)).count("dot_general[")
        for f in (_weighted, _losses)
    ]
    assert counts == [3, 4]


def _model(family, remat="full"):
    config = TransformerConfig(
        family,
        vocab=40,
        embed=16,
        mlp=32,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=8,
        query_scale=0.3,
        windows=(4, None) if family == "gemma2" else (None,),
        attention_cap=50.0 if family == "gemma2" else None,
        final_cap=30.0 if family == "gemma2" else None,
        tied=family == "gemma2",
    )
    return Transformer(config, remat=remat, rngs=nnx.Rngs(0))


def _batch(rows=8, length=12, segments=2):
    rng = np.random.default_rng(0)
    ids = np.repeat([[1, 2]], length // 2, axis=1).reshape(1, length)
    ids = np.sort(np.tile(ids, (rows, 1)), axis=1).astype(np.int32)
    return {
        "tokens": rng.integers(0, 40, (rows, length)).astype(np.int32),
        "targets": rng.integers(-1, 40, (rows, length)).astype(np.int32),
        "segment_ids": ids,
        "positions": np.tile(np.arange(length) % (length // 2), (rows, 1)).astype(np.int32),
        "weight": rng.random((rows, segments)).astype(np.float32),
        "mask": np.ones((rows, segments), bool),
    }


def _step(model, mesh, trainable, reduction="example_mean"):
    optimizer = optax.sgd(0.1)
    step = make_train_step(
        nnx.graphdef(model), causal_lm_loss, optimizer, reduction=reduction, mesh=mesh
    )
    mesh = devices_mesh(1) if mesh is None else mesh
    state = init_train_state(model, optimizer, trainable=trainable, mesh=mesh)
    return step(state, sharding.shard_batch(_batch(), mesh))


def _with_adapters(family, remat, window, adapters):
    """A model and what is trained of it."""
    model = _model(family, remat)
    if window is not None:
        config = dataclasses.replace(model.config, windows=(window, None))
        model = Transformer(config, remat=remat, rngs=nnx.Rngs(0))
    if adapters:
        lora.add_adapters(model, rank=2, alpha=2.0, rngs=nnx.Rngs(1))
    return model, nnx.LoRAParam if adapters else nnx.Param


@functools.lru_cache
def _one_device(*case):
    model, trainable = _with_adapters(*case)
    return _step(model, None, trainable)


def _assert_as_on_one_device(sizes, *case):
    expected, one = _one_device(*case)
    model, trainable = _with_adapters(*case)
    actual, many = _step(model, _mesh(sizes), trainable)
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(many["grad_norm"], one["grad_norm"], rtol=1e-4)
    leaves = [jax.tree.leaves(state.params) for state in (actual, expected)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "family", "remat", "adapters"),
    [
        *((sizes, "gemma2", "full", False) for sizes in MESHES),
        ((1, 8, 1), "llama", "outputs", False),
        ((2, 2, 2), "llama", "outputs", False),
        ((2, 2, 2), "gemma2", "outputs", True),
        ((1, 2, 4), "gemma2", "outputs", True),
    ],
)
def test_a_step_on_a_mesh_is_the_step_of_one_device(sizes, family, remat, adapters):
    _assert_as_on_one_device(sizes, family, remat, None, adapters)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "window", "adapters"),  # windows: shorter than the row; as good as none
    [((1, 8, 1), 4, False), ((1, 8, 1), 99, True), ((2, 2, 2), 4, True), ((2, 2, 2), 99, False)],
)
def test_what_is_traced_for_tpus_computes_the_same(monkeypatch, sizes, window, adapters):
    """A scan over single layers where they are alike, kernels in their own shapes; the heads are
    too small for the kernel."""
    case = ("gemma2", "outputs", window, adapters)
    _one_device(*case)
    monkeypatch.setattr(sharding, "is_tpu", lambda mesh: mesh is not None)
    _assert_as_on_one_device(sizes, *case)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["token_mean", "example_mean", "weight_mean"])
def test_the_weighted_sum_is_the_sum_of_the_examples(reduction):
    """`causal_lm_loss` against itself without its second form."""
    model, mesh = _model("gemma2"), _mesh((1, 8, 1))
    optimizer = optax.sgd(0.1)
    states = []
    for loss_fn in (causal_lm_loss, lambda model, batch: causal_lm_loss(model, batch)):
        step = make_train_step(
            nnx.graphdef(model), loss_fn, optimizer, reduction=reduction, mesh=mesh
        )
        state = init_train_state(model, optimizer, mesh=mesh)
        states.append(step(state, sharding.shard_batch(_batch(), mesh)))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_scores_on_a_mesh_are_those_of_one_device(sizes):
    graphdef, state = nnx.split(_model("gemma2"))
    batch = {name: jnp.asarray(array) for name, array in _batch().items()}
    expected = jax.jit(causal_lm_token_losses)(nnx.merge(graphdef, state), batch)
    mesh = _mesh(sizes)
    placed = sharding.shard_tree(state, mesh), sharding.shard_batch(_batch(), mesh)
    actual = make_score_step(graphdef, causal_lm_token_losses, mesh)(*placed)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
