"""The anchor `kl` in the training step: against whole logits, any split, adapters and stages."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
import pytest
from flax import nnx
from helpers import devices_mesh

import easy_jax as ej
from easy_jax.core import weightings
from easy_jax.core.anchors import anchor, frozen_of
from easy_jax.core.causal_lm import causal_lm_loss
from easy_jax.core.losses import ContractError
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.data import training_loader
from easy_jax.kernels.linear_cross_entropy import NO_TARGET
from easy_jax.models import lora
from easy_jax.parallel import sharding
from easy_jax.parallel.processes import Stopped
from easy_jax.train.config import StageConfig
from easy_jax.train.fitting import fit

pytestmark = pytest.mark.slow

STRENGTH = 0.3


def _batch(weight_N=None, rows=16):
    source = packed.source()
    loader = training_loader(
        source, rows, epochs=1, seed=0, weight_N=weight_N, rows=np.arange(rows)
    )
    (batch,) = list(loader)
    del batch["example_id"]
    return batch


def _moved(params, scale=0.05):
    """Parameters near the frozen ones."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def _stepped(batch, *, model=None, weighting=None, reduction="token_mean", devices=1, **options):
    """Parameters and metrics after a step of plain descent, away from the frozen parameters."""
    mesh = devices_mesh(devices)
    model = packed.model("gemma2") if model is None else model
    trainable = options.pop("trainable", nnx.Param)
    optimizer = optax.chain(anchor("kl", options.pop("strength", STRENGTH)), optax.sgd(1.0))
    step = make_train_step(
        nnx.graphdef(model),
        causal_lm_loss,
        optimizer,
        reduction=reduction,
        weighting=weighting,
        mesh=mesh,
        **options,
    )
    state = init_train_state(model, optimizer, trainable=trainable, mesh=mesh)
    start = jax.device_get(state.params)
    state = dataclasses.replace(state, params=jax.jit(_moved)(state.params))
    state, metrics = step(state, sharding.shard_batch(batch, mesh))
    return jax.device_get((state.params, metrics)), start


def _whole_logits(batch, reduction, is_dft):
    """`(params, frozen) -> (total, (loss, kl))`, by `jax.nn.log_softmax` of whole logits."""
    graphdef = nnx.graphdef(packed.model("gemma2"))
    inputs = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    target_RT, segment_RT = batch["targets"], batch["segment_ids"]
    there_RT = target_RT != NO_TARGET
    weight_RS = np.where(batch["mask"], batch["weight"], 0.0)
    count_RS = np.stack(
        [(there_RT & (segment_RT == s + 1)).sum(1) for s in range(weight_RS.shape[1])], axis=1
    )
    unit_RS = weight_RS if reduction == "weight_mean" else (weight_RS != 0).astype(np.float64)
    per_RS = (
        np.where(count_RS > 0, 1 / np.maximum(count_RS, 1), 0) if reduction == "example_mean" else 1
    )
    size = {
        "token_mean": np.where(batch["mask"], count_RS, 0).sum(),
        "example_mean": batch["mask"].sum(),
        "weight_mean": (weight_RS * count_RS).sum(),
    }[reduction]

    def by_token(x_RS):
        x_RS = np.concatenate([np.zeros((len(x_RS), 1)), x_RS], axis=1)
        return np.where(there_RT, np.take_along_axis(x_RS, segment_RT, axis=1), 0.0) / size

    def function(params, frozen):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(*inputs))
        log_p0 = jax.nn.log_softmax(nnx.merge(graphdef, frozen)(*inputs))
        chosen = jnp.where(there_RT, target_RT, 0)[..., None]
        nll_RT = -jnp.take_along_axis(log_p, chosen, axis=-1)[..., 0]
        rule_RT = jax.lax.stop_gradient(jnp.exp(-nll_RT)) if is_dft else 1.0
        kl_RT = jnp.sum(jnp.exp(log_p0) * (log_p0 - log_p), axis=-1)
        loss = jnp.sum(by_token(weight_RS * per_RS) * rule_RT * nll_RT)
        kl = jnp.sum(by_token(unit_RS * per_RS) * kl_RT)
        return loss + STRENGTH * kl, (loss, kl)

    return function


@pytest.mark.parametrize("is_dft", [False, True])
@pytest.mark.parametrize("reduction", packed.REDUCTIONS)
def test_the_step_is_that_of_whole_logits(reduction, is_dft):
    """With DFT's weights this is ASFT."""
    weight_N = np.random.default_rng(0).random(packed.SIZE)
    weight_N[::4] = 0.0
    batch = _batch(weight_N)
    weighting = weightings.get("dft") if is_dft else None
    (params, metrics), start = _stepped(batch, weighting=weighting, reduction=reduction)
    moved = jax.jit(_moved)(start)
    function = _whole_logits(batch, reduction, is_dft)
    gradient, (loss, kl) = jax.jit(jax.grad(function, has_aux=True))(moved, start)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    assert metrics["kl"] > 0.01
    expected = jax.tree.map(lambda p, g: p - g, moved, gradient)
    chex.assert_trees_all_close(params, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [None, "dft", "talr"])
def test_any_split_gives_the_same_step(name):
    weighting = None if name is None else weightings.get(name)
    batch = _batch()
    expected, _ = _stepped(batch, weighting=weighting)
    found, _ = _stepped(batch, weighting=weighting, devices=8, micro_batches=2)
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)
    assert expected[1]["kl"] > 0


def test_the_divergence_and_its_gradient_are_0_at_the_start():
    mesh, model, batch = devices_mesh(1), packed.model("llama"), _batch()
    grads = []
    for chained in (optax.sgd(1.0), optax.chain(anchor("kl", 100.0), optax.sgd(1.0))):
        step = make_train_step(
            nnx.graphdef(model), causal_lm_loss, chained, reduction="token_mean", mesh=mesh
        )
        state = init_train_state(model, chained, mesh=mesh)
        state, metrics = step(state, sharding.shard_batch(batch, mesh))
        grads.append(jax.device_get(state.params))
    assert abs(metrics["kl"]) < 1e-6
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-4)


def test_adapters_are_compared_with_the_model_without_them():
    adapted = nnx.clone(packed.model("llama"))
    lora.add_adapters(adapted, rank=2, alpha=2.0, rngs=nnx.Rngs(0))
    options = {"model": adapted, "trainable": nnx.LoRAParam, "strength": 0.5}
    (_, metrics), start = _stepped(_batch(), **options)
    assert metrics["kl"] > 0
    sizes = [x.size for x in jax.tree.leaves(start)]
    assert sum(sizes) < sum(x.size for x in jax.tree.leaves(nnx.state(packed.model("llama")))) / 2


def test_a_stage_is_continued_from_its_checkpoints(tmp_path):
    """The frozen parameters come from the checkpoint; a resumed run is bit-identical."""
    optimizer = ej.OptimizerConfig(learning_rate=0.1, anchor="kl", anchor_strength=STRENGTH)
    stage = StageConfig(epochs=2, batch_size=8, reduction="token_mean", optimizer=optimizer)

    left = itertools.count(1)

    def stop(steps):
        del steps
        if next(left) == 4:
            raise Stopped("")

    def run(where, **options):
        return fit(
            packed.model("llama"),
            packed.source(),
            tmp_path / where,
            stage=stage,
            loss_fn=causal_lm_loss,
            mesh=devices_mesh(1),
            save_every_steps=2,
            **options,
        )

    whole = run("whole")
    with pytest.raises(Stopped):
        run("parts", progress=stop)
    parts = run("parts")
    assert parts.resumed_from == 2
    chex.assert_trees_all_equal(parts.model_state, whole.model_state)
    other = dataclasses.replace(optimizer, anchor="none", anchor_strength=0.0)
    stage = dataclasses.replace(stage, optimizer=other)
    free = run("free")
    start = nnx.state(packed.model("llama"), nnx.Param)
    distance = [
        optax.tree.norm(jax.tree.map(jnp.subtract, done.model_state, start))
        for done in (whole, free)
    ]
    assert distance[0] != distance[1]


def test_losses_without_a_distribution_are_refused():
    model, optimizer = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), anchor("kl", 0.1)

    def loss_fn(model, batch):
        return ej.squared_error(model(batch["x"]), batch["y"])

    step = make_train_step(nnx.graphdef(model), loss_fn, optimizer, reduction="example_mean")
    batch = {"x": jnp.ones((1, 1)), "y": jnp.ones((1, 1)), "weight": jnp.ones(1)}
    batch["mask"] = jnp.ones(1, bool)
    with pytest.raises(ContractError, match=r"'kl' compares distributions .*loss_fn gives losses"):
        step(init_train_state(model, optimizer, mesh=devices_mesh(1)), batch)


def test_a_step_that_does_not_compute_it_is_refused():
    optimizer = optax.chain(anchor("kl", 0.1), optax.sgd(0.1))
    params = {"w": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"'kl' is computed in the step of make_train_step"):
        optimizer.update(params, optimizer.init(params), params)


def _refused(optimizer, match):
    model = packed.model("llama")
    mesh = devices_mesh(1)
    step = make_train_step(
        nnx.graphdef(model), causal_lm_loss, optimizer, reduction="token_mean", mesh=mesh
    )
    with pytest.raises(ValueError, match=match):
        step(init_train_state(model, optimizer, mesh=mesh), sharding.shard_batch(_batch(), mesh))


def test_two_anchors_and_hidden_ones_are_refused():
    _refused(optax.chain(anchor("kl", 0.1), anchor("kl", 0.2), optax.sgd(0.1)), "has 2 anchors")
    _refused(
        optax.MultiSteps(optax.chain(anchor("kl", 0.1), optax.sgd(0.1)), 2),
        r"put it outside of optax\.MultiSteps",
    )
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    masked = optax.masked(anchor("kl", 0.1), {"a": True, "b": False}).init(params)
    with pytest.raises(ValueError, match=r"put it outside of optax\.masked"):
        frozen_of(masked)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_out_of_range(strength):
    for name in ("kl", "l2_sp"):
        with pytest.raises(ValueError, match=r"strength is .*; it must be finite and at least 0"):
            anchor(name, strength)


def test_a_strength_may_follow_a_schedule():
    """A new value takes effect in the step after."""
    model, mesh = packed.model("llama"), devices_mesh(1)

    def chained(strength):
        return optax.chain(anchor("kl", strength), optax.sgd(0.1))

    def run(optimizer):
        step = make_train_step(
            nnx.graphdef(model), causal_lm_loss, optimizer, reduction="token_mean", mesh=mesh
        )
        state, found = init_train_state(model, optimizer, mesh=mesh), []
        for _ in range(4):
            state, _ = step(state, sharding.shard_batch(_batch(), mesh))
            found.append(float(frozen_of(state.opt_state).strength))
        return found

    scheduled = optax.inject_hyperparams(chained)(strength=lambda count: 0.5 * count)
    assert run(scheduled) == [0.0, 0.5, 1.0, 1.5]


def test_the_loss_is_exact_beside_a_large_divergence():
    (_, small), _ = _stepped(_batch(), strength=1e-3)
    (_, large), _ = _stepped(_batch(), strength=1e8)
    np.testing.assert_allclose(large["loss"], small["loss"], rtol=1e-6)
