"""Low-rank adapters: what they compute, and that nothing else is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import devices_mesh

from easy_jax.config import MeshConfig
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.kernels.linear_cross_entropy import linear_cross_entropy
from easy_jax.models.lora import TARGETS, add_adapters, merged_kernel
from easy_jax.models.transformer import Transformer
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.parallel import sharding

CONFIG = TransformerConfig(
    "llama", vocab=16, embed=8, mlp=12, layers=2, heads=4, kv_heads=2, head_dim=6, query_scale=0.4
)
RANK, ALPHA = 2, 3.0
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, (4, 6)).astype(np.int32)


def _model(**options):
    return Transformer(CONFIG, rngs=nnx.Rngs(0), **options)


def _with_adapters(targets=TARGETS, random=True, **options):
    """A model with adapters; a random B, unless it is to be as `add_adapters` leaves it."""
    model = _model(**options)
    add_adapters(model, rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(1), targets=targets)
    if random:
        for seed, block in enumerate(model.blocks):
            for number, name in enumerate(targets):
                b = getattr(block, name).lora_b
                key = jax.random.fold_in(jax.random.key(seed), number)
                b[...] = 0.3 * jax.random.normal(key, b.shape)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("targets", [TARGETS, ("q", "down")])
def test_new_adapters_change_nothing(targets):
    model = _with_adapters(targets, random=False)
    np.testing.assert_array_equal(model(TOKENS), _model()(TOKENS))
    adapted = {name for name in TARGETS if getattr(model.blocks[0], name).lora_a is not None}
    assert adapted == set(targets)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_merged_kernel_is_that_of_numpy(name):
    linear = getattr(_with_adapters().blocks[0], name)
    kernel, a, b = (np.float64(x[...]) for x in (linear.kernel, linear.lora_a, linear.lora_b))
    assert np.any(b)
    for group in range(CONFIG.layers):
        # Every axis but the rank's flattened: [in, rank] @ [rank, out].
        update = a[group].reshape(-1, RANK) @ b[group].reshape(RANK, -1)
        expected = kernel[group] + ALPHA / RANK * update.reshape(kernel[group].shape)
        np.testing.assert_allclose(merged_kernel(linear)[group], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_merged_kernels_compute_the_same():
    adapted, merged = _with_adapters(), _model()
    for name in TARGETS:
        kernel = merged_kernel(getattr(adapted.blocks[0], name))
        getattr(merged.blocks[0], name).kernel[...] = kernel
    assert np.abs(adapted(TOKENS) - _model()(TOKENS)).max() > 1e-2
    np.testing.assert_allclose(adapted(TOKENS), merged(TOKENS), atol=1e-5)


@pytest.mark.slow
def test_without_adapters_the_merged_kernel_is_the_kernel():
    linear = _model().blocks[0].q
    np.testing.assert_array_equal(merged_kernel(linear), linear.kernel[...])


@pytest.mark.slow
def test_dtypes():
    model = _with_adapters(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    linear = model.blocks[0].q
    assert linear.lora_a.dtype == linear.lora_b.dtype == jnp.float32
    assert merged_kernel(linear).dtype == jnp.bfloat16
    assert model.hidden_states(TOKENS).dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_split_merged_and_jitted(remat):
    model = _with_adapters(remat=remat)
    graphdef, state = nnx.split(model)
    actual = jax.jit(lambda state: nnx.merge(graphdef, state)(TOKENS))(state)
    np.testing.assert_allclose(actual, _with_adapters()(TOKENS), atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m: m(TOKENS))(model), actual, atol=1e-5)


def _nll(model, batch):
    hidden = model.hidden_states(batch["tokens"])
    nll = linear_cross_entropy(hidden, model.head_VD(), batch["targets"])
    return jnp.sum(nll, axis=1), jnp.sum(batch["targets"] >= 0, axis=1).astype(jnp.float32)


BATCH = {
    "tokens": TOKENS,
    "targets": np.roll(TOKENS, -1, axis=1),
    "weight": np.ones(4, np.float32),
    "mask": np.ones(4, bool),
}


def _train(model, mesh, steps=3):
    optimizer = optax.adam(1e-2)
    state = init_train_state(model, optimizer, mesh=mesh, trainable=nnx.LoRAParam)
    step = make_train_step(nnx.graphdef(model), _nll, optimizer, reduction="token_mean")
    losses = []
    for _ in range(steps):
        state, metrics = step(state, sharding.shard_batch(BATCH, mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.slow
def test_adapters_alone_are_trained():
    model = _with_adapters(random=False)
    state, losses = _train(model, devices_mesh(1))
    assert losses[2] < losses[1] < losses[0]
    before = dict(nnx.to_flat_state(nnx.state(model)))
    trained = dict(nnx.to_flat_state(state.params))
    assert {path[-1] for path in trained} == {"lora_a", "lora_b"}
    assert len(trained) == 2 * len(TARGETS)
    for path, variable in trained.items():
        assert np.any(variable[...] != before[path][...]), path
    frozen = dict(nnx.to_flat_state(state.non_trainable))
    assert frozen.keys() | trained.keys() == before.keys()
    for path, variable in frozen.items():
        assert np.asarray(variable[...]).tobytes() == np.asarray(before[path][...]).tobytes(), path


@pytest.mark.slow
def test_the_optimiser_holds_adapters_only():
    state, _ = _train(_with_adapters(), devices_mesh(1), steps=1)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.params))
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sorted(shapes + shapes)


@pytest.mark.slow
def test_sharded_training_is_that_of_one_device():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    (one, losses), (many, sharded_losses) = (
        _train(_with_adapters(), each) for each in (devices_mesh(1), mesh)
    )
    np.testing.assert_allclose(losses, sharded_losses, rtol=1e-4)
    a = dict(nnx.to_flat_state(many.params))["blocks", 0, "down", "lora_a"][...]
    assert a.sharding.shard_shape(a.shape) == (CONFIG.layers, CONFIG.mlp // 2, RANK)
    for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"targets": ["q", "head"]}, r"targets are \['q', 'head'\]; each must be one of"),
        ({"targets": []}, r"targets are \[\]; each must be one of"),
        ({"targets": ["q", "q"]}, r"each must be one of .*, without repeats"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(_model(), **({"rank": 1, "alpha": 1.0, "rngs": nnx.Rngs(0)} | options))


@pytest.mark.slow
def test_adapters_are_added_once():
    model = _with_adapters(["k"])
    with pytest.raises(ValueError, match="k has adapters already"):
        add_adapters(model, rank=1, alpha=1.0, rngs=nnx.Rngs(0))
    # Refused before anything was changed: not even the maps ahead of k.
    assert model.blocks[0].q.lora_a is None
