"""The weighted step against NumPy and finite differences, and its invariances (contract 2)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import devices_mesh

from easy_jax.core.losses import classification_loss
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.models import resnet
from easy_jax.models.modes import eval_mode
from easy_jax.parallel import sharding

RATE = 0.1
REDUCTIONS = ("token_mean", "example_mean", "weight_mean")


def summed_squared_error(model, batch):
    """A loss with a different count per example, like a sequence of `count` tokens."""
    error = jnp.square(model(batch["x"]) - batch["y"]) * batch["token_mask"]
    return jnp.sum(error, axis=1), jnp.sum(batch["token_mask"], axis=1)


def _linear_batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    token_mask = (rng.random((size, 4)) < 0.7).astype(np.float32)
    token_mask[:, 0] = 1.0
    return {
        "x": rng.normal(size=(size, 3)).astype(np.float32),
        "y": rng.normal(size=(size, 4)).astype(np.float32),
        "token_mask": token_mask,
        "weight": rng.random(size).astype(np.float32),
        "mask": rng.random(size) < 0.8,
    }


def _linear():
    return nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def _step(model, batch, *, loss_fn=summed_squared_error, mesh=None, trainable=nnx.Param, **options):
    """State and metrics after one SGD step of rate RATE."""
    mesh = devices_mesh(1) if mesh is None else mesh
    optimizer = optax.sgd(RATE)
    step = make_train_step(nnx.graphdef(model), loss_fn, optimizer, **options)
    state = init_train_state(model, optimizer, mesh=mesh, trainable=trainable)
    return step(state, sharding.shard_batch(batch, mesh))


def _gradient(model, batch, **options):
    """The gradient that the step used, by parameter path."""
    state, metrics = _step(model, batch, **options)
    before = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    gradient = {
        path: (np.asarray(before[path][...]) - np.asarray(after[...])) / RATE
        for path, after in nnx.to_flat_state(state.params)
    }
    return gradient, metrics


def _numpy_loss(kernel, bias, batch, reduction):
    """The reductions, written out over examples in float64."""
    x, y, tokens = (np.float64(batch[name]) for name in ("x", "y", "token_mask"))
    numerator = denominator = 0.0
    for i in np.flatnonzero(batch["mask"]):
        w, count = float(batch["weight"][i]), tokens[i].sum()
        total = (((x[i] @ kernel + bias) - y[i]) ** 2 * tokens[i]).sum()
        if reduction == "example_mean":
            numerator, denominator = numerator + w * total / count, denominator + 1
        elif reduction == "token_mean":
            numerator, denominator = numerator + w * total, denominator + count
        else:
            numerator, denominator = numerator + w * total, denominator + w * count
    return numerator / denominator


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_step_equals_numpy_and_finite_differences(reduction):
    model, batch = _linear(), _linear_batch()
    gradient, metrics = _gradient(model, batch, reduction=reduction)
    kernel, bias = np.float64(model.kernel[...]), np.float64(model.bias[...])
    loss = _numpy_loss(kernel, bias, batch, reduction)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)

    h = 1e-5
    numeric = np.zeros_like(kernel)
    for index in np.ndindex(*kernel.shape):
        bump = np.zeros_like(kernel)
        bump[index] = h
        numeric[index] = (
            _numpy_loss(kernel + bump, bias, batch, reduction)
            - _numpy_loss(kernel - bump, bias, batch, reduction)
        ) / (2 * h)
    np.testing.assert_allclose(gradient[("kernel",)], numeric, rtol=1e-3, atol=1e-5)
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def _resnet():
    # Eval mode: BatchNorm couples the examples of a batch, and these laws are about the loss.
    return eval_mode(
        resnet.ResNet(resnet.ResNetConfig(width=4, depths=(1, 1)), 3, rngs=nnx.Rngs(0))
    )


@pytest.fixture(scope="module")
def network():
    return _resnet()


def _image_batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 3, size).astype(np.int32),
        "weight": rng.random(size).astype(np.float32) + 0.1,
        "mask": np.ones(size, bool),
    }


def _assert_close(a, b, rtol=1e-4, atol=1e-6):
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_allclose(value, b[path], rtol=rtol, atol=atol, err_msg=str(path))


@pytest.mark.slow
def test_weights_of_one_give_plain_fine_tuning(network):
    batch = {**_image_batch(), "weight": np.ones(16, np.float32)}

    def plain(params, rest):
        logits = nnx.merge(nnx.graphdef(network), params, rest)(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    params, rest = nnx.split_state(nnx.state(network), nnx.Param, ...)
    expected = {
        path: np.asarray(v[...])
        for path, v in nnx.to_flat_state(jax.jit(jax.grad(plain))(params, rest))
    }
    for reduction in REDUCTIONS:
        gradient, _ = _gradient(network, batch, loss_fn=classification_loss, reduction=reduction)
        _assert_close(gradient, expected, atol=2e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_of_zero_removes_the_example(reduction):
    model, batch = _linear(), _linear_batch()
    batch["mask"][:] = True
    batch["weight"][3] = 0.0
    without = {**batch, "mask": np.arange(16) != 3}
    gradient, _ = _gradient(model, batch, reduction=reduction)
    removed, _ = _gradient(model, without, reduction=reduction)
    # Only weight_mean's denominator knows the weights; the others keep counting the example.
    tokens = batch["token_mask"].sum(axis=1)
    scale = {
        "weight_mean": 1.0,
        "example_mean": 15 / 16,
        "token_mean": 1.0 - tokens[3] / tokens.sum(),
    }[reduction]
    _assert_close(gradient, {path: scale * g for path, g in removed.items()})


@pytest.mark.slow
def test_the_content_of_padding_does_not_matter():
    model, batch = _linear(), _linear_batch()
    junk = {name: array.copy() for name, array in batch.items()}
    junk["x"][~batch["mask"]] = 1e6
    junk["weight"][~batch["mask"]] = np.nan
    for reduction in REDUCTIONS:
        clean, metrics = _gradient(model, batch, reduction=reduction)
        dirty, dirty_metrics = _gradient(model, junk, reduction=reduction)
        assert float(metrics["loss"]) == float(dirty_metrics["loss"])
        _assert_close(clean, dirty, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_split_gives_the_same_gradient(reduction):
    # Micro-batches of unequal counts, weights and padding: the denominator must be global.
    model, batch = _linear(), _linear_batch(32)
    whole, metrics = _gradient(model, batch, reduction=reduction)
    for micro_batches in (1, 2, 4):
        for count in (1, 2, 8):
            part, part_metrics = _gradient(
                model,
                batch,
                mesh=devices_mesh(count),
                reduction=reduction,
                micro_batches=micro_batches,
            )
            _assert_close(part, whole)
            np.testing.assert_allclose(part_metrics["loss"], metrics["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "fsdp"), [(2, 1), (8, 1), (8, 4)])
def test_a_network_in_train_mode_does_not_see_the_devices(network, count, fsdp):
    # BatchNorm's statistics are of the global batch, so even train mode is invariant.
    train = nnx.view(network, use_running_average=False)
    batch = _image_batch()
    batch["mask"][-3:] = False
    options = {"loss_fn": classification_loss, "reduction": "example_mean"}
    one, metrics = _step(train, batch, **options)
    many, many_metrics = _step(train, batch, mesh=devices_mesh(count, fsdp), **options)
    np.testing.assert_allclose(many_metrics["loss"], metrics["loss"], rtol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(many.model_state()), jax.device_get(one.model_state()), rtol=1e-4, atol=1e-5
    )
    if fsdp > 1:
        kernel = many.params["blocks"][0]["conv1"]["kernel"].get_value()
        shard = kernel.addressable_shards[0].data
        assert shard.size * fsdp == kernel.size


@pytest.mark.slow
def test_padding_stays_out_of_the_batch_statistics(network):
    train = nnx.view(network, use_running_average=False)
    short = _image_batch(12)
    padded = {name: np.concatenate([array, array[:4]]) for name, array in short.items()}
    padded["image"][12:] = 1e3
    padded["mask"][12:] = False
    options = {"loss_fn": classification_loss, "reduction": "example_mean"}
    a, _ = _step(train, short, **options)
    b, _ = _step(train, padded, **options)
    chex.assert_trees_all_close(a.model_state(), b.model_state(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_micro_batch_of_padding_alone_changes_nothing(network):
    # Micro-batch m of 4 has the examples m, m + 4, ...: here the last is padding alone.
    train = nnx.view(network, use_running_average=False)
    batch = _image_batch(16)
    batch["mask"] = np.arange(16) % 4 != 3
    keep = np.flatnonzero(batch["mask"])
    without = {name: array[keep] for name, array in batch.items()}
    options = {"loss_fn": classification_loss, "reduction": "example_mean"}
    four, metrics = _step(train, batch, micro_batches=4, **options)
    three, expected = _step(train, without, micro_batches=3, **options)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    chex.assert_trees_all_close(four.model_state(), three.model_state(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_frozen_parameters_do_not_move_and_have_no_optimiser_state(network):
    batch = _image_batch()
    optimizer = optax.adam(0.1)
    state = init_train_state(network, optimizer, mesh=devices_mesh(1), trainable=resnet.head_params)
    assert {path[0] for path, _ in nnx.to_flat_state(state.params)} == {"head"}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params)) + 1
    step = make_train_step(
        nnx.graphdef(network), classification_loss, optimizer, reduction="example_mean"
    )
    after, _ = step(state, sharding.shard_batch(batch, devices_mesh(1)))
    start = dict(nnx.to_flat_state(nnx.state(network)))
    for path, value in nnx.to_flat_state(after.model_state()):
        moved = (np.asarray(value[...]) != np.asarray(start[path][...])).any()
        assert moved == (path[0] == "head"), path


def test_the_model_given_survives_the_donated_state():
    model, batch = _linear(), _linear_batch()
    before = np.array(model.kernel[...])
    _step(model, batch, reduction="example_mean")
    np.testing.assert_array_equal(model.kernel[...], before)


def test_one_compilation_for_many_steps():
    model, mesh = _linear(), devices_mesh(8)
    optimizer = optax.sgd(RATE, momentum=0.9)
    traces = chex.assert_max_traces(summed_squared_error, n=1)
    step = make_train_step(nnx.graphdef(model), traces, optimizer, reduction="token_mean")
    state = init_train_state(model, optimizer, mesh=mesh)
    for seed in range(5):
        state, _ = step(state, sharding.shard_batch(_linear_batch(seed=seed), mesh))
    assert int(state.step) == 5
    assert step._cache_size() == 1


def test_all_weights_zero_is_a_zero_step_and_not_nan():
    model, batch = _linear(), {**_linear_batch(), "weight": np.zeros(16, np.float32)}
    for reduction in REDUCTIONS:
        gradient, metrics = _gradient(model, batch, reduction=reduction)
        assert float(metrics["loss"]) == 0.0
        assert all((g == 0).all() for g in gradient.values())


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        make_train_step(
            nnx.graphdef(_linear()), summed_squared_error, optax.sgd(1), reduction="mean"
        )
    with pytest.raises(ValueError, match="a batch of 16 does not divide into 3"):
        _step(_linear(), _linear_batch(), reduction="token_mean", micro_batches=3)


def test_counts_of_removed_examples_cost_nothing():
    # `token_mean` calls the loss function twice; the compiler removes the second forward pass.
    model, mesh, optimizer = _linear(), devices_mesh(1), optax.sgd(RATE)
    batch = sharding.shard_batch(_linear_batch(size=64), mesh)
    flops = {}
    for reduction in REDUCTIONS:
        step = make_train_step(
            nnx.graphdef(model), summed_squared_error, optimizer, reduction=reduction
        )
        compiled = step.lower(init_train_state(model, optimizer, mesh=mesh), batch).compile()
        flops[reduction] = compiled.cost_analysis()["flops"]
    # A second forward pass through the layer would take 2 * 64 * 3 * 4 = 1536 more.
    assert abs(flops["token_mean"] - flops["weight_mean"]) < 768


def test_a_state_keeps_the_keys_of_stored_checkpoints():
    state = init_train_state(_linear(), optax.sgd(RATE), trainable=nnx.PathContains("kernel"))
    keys = {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert keys == {"step", "params", "rest"}  # plain SGD has no state of its own
    with pytest.warns(DeprecationWarning, match=r"TrainState\.rest is now .*non_trainable"):
        rest = state.rest
    assert rest is state.non_trainable and sorted(rest) == ["bias"]
