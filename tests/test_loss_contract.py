"""What a loss function must return: each mistake is one sentence with its cure."""

import dataclasses
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_runs import (
    LABEL,
    SOURCE,
    STAGE,
    B,
    Model,
    X,
    fit,
    losses,
    packed_source,
    pair,
    score,
    tiny_model,
)
from flax import nnx

import easy_jax as ej
from easy_jax.core import contract
from easy_jax.core.losses import ContractError


def own_loop(loss_fn, directory):
    del directory
    optimizer = optax.sgd(0.1)
    step = ej.make_train_step(nnx.graphdef(Model()), loss_fn, optimizer, reduction="example_mean")
    batch = next(iter(ej.training_loader(SOURCE, B, epochs=1, seed=0)))
    batch.pop("example_id")
    step(ej.init_train_state(Model(), optimizer), ej.shard_batch(batch, ej.make_mesh()))


RETURNS = {
    "scalar": (lambda m, b: losses(m, b).mean(), "returned a scalar; .* leave out the mean"),
    "mean_and_one": (
        lambda m, b: (losses(m, b).mean(), 1.0),
        r"returned 2 values \(a scalar, the number 1.0\); .* leave out the mean",
    ),
    "mean_and_ones": (
        lambda m, b: (losses(m, b).mean(), jnp.ones(B)),
        r"returned 2 values \(a scalar, an array of shape \(8,\)\); .* leave out the mean",
    ),
    "losses_and_one": (
        lambda m, b: (losses(m, b), 1.0),
        r"2 values \(an array of shape \(8,\), the number 1.0\); .* jnp.ones\(\(8,\)\)",
    ),
    "column": (lambda m, b: losses(m, b)[:, None], r"shape \(8, 1\); .* take \[\.\.\., 0\]"),
    "logits": (lambda m, b: m(b["x"]), r"of shape \(8, 2\); .* sum over all but the examples"),
    "wrong_length": (lambda m, b: losses(m, b)[1:], r"an array of shape \(7,\); "),
    "three": (lambda m, b: (losses(m, b), jnp.ones(B), m), "returned 3 values .* the first two al"),
    "dict": (lambda m, b: {"loss": losses(m, b)}, "returned a dict with the keys loss; "),
    "none": (lambda m, b: None, "returned None; .* is its return missing?"),
    "integers": (lambda m, b: b["y"], "losses of dtype int32; they must be floats"),
    "field": (
        lambda m, b: (m(b["image"]), b["mask"]),
        "looks for a field 'image', and the batch has mask, .*x, y: rename",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", [score, fit, own_loop])
@pytest.mark.parametrize("name", RETURNS)
def test_what_a_loss_function_returns(name, run, tmp_path):
    loss_fn, message = RETURNS[name]
    with pytest.raises(ContractError, match=message) as error:
        run(loss_fn, tmp_path)
    assert "\n" not in str(error.value) and "<lambda>" in str(error.value)
    assert list(tmp_path.glob("*.json")) == []  # nothing that refuses the next call


@pytest.mark.slow
def test_losses_alone_count_one_each(tmp_path):
    alone, both = (score(each, tmp_path / each.__name__) for each in (losses, pair))
    np.testing.assert_array_equal(alone.loss_N(), both.loss_N())
    counts = np.concatenate([count for _, _, count in alone.rows()])
    np.testing.assert_array_equal(counts, np.ones(20))
    one, other = (fit(each, tmp_path / f"fit_{each.__name__}") for each in (losses, pair))
    chex.assert_trees_all_equal(jax.device_get(one.model_state), jax.device_get(other.model_state))


def test_counts_may_be_integers(tmp_path):
    table = score(lambda m, b: (2 * losses(m, b), jnp.full(B, 2)), tmp_path / "a")
    np.testing.assert_allclose(table.loss_N(), score(losses, tmp_path / "b").loss_N(), rtol=1e-6)


# Losses that depend on the other examples of the batch.


def _mean(values, batch):
    return jnp.full(values.shape, values.mean())


COUPLED = {
    "mean": _mean,
    "masked_mean": lambda v, b: jnp.full(v.shape, (v * b["mask"]).sum() / b["mask"].sum()),
    "divided": lambda v, b: v / b["mask"].sum(),
    "less_the_mean": lambda v, b: v - v.mean() + 10.0,
    "sorted": lambda v, b: jnp.sort(v),
    "reversed": lambda v, b: v[::-1],
    "moved": lambda v, b: jnp.roll(v, 2),
    "the_first": lambda v, b: jnp.full(v.shape, v[0]),
    "the_largest": lambda v, b: jnp.full(v.shape, v.max()),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", [score, fit])
@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_depend_on_the_batch(name, run, tmp_path):
    def loss_fn(model, batch):
        return COUPLED[name](losses(model, batch), batch)

    message = r"loss_fn returns of an example depends on the others in its batch: of example id \d"
    with pytest.raises(ContractError, match=message):
        run(loss_fn, tmp_path)


def test_a_count_that_depends_on_the_batch(tmp_path):
    with pytest.raises(ContractError, match="depends on the others in its batch"):
        score(lambda m, b: (losses(m, b), jnp.full(B, b["mask"].sum())), tmp_path)


def test_a_mean_is_told_of_a_large_batch_of_similar_losses(tmp_path):
    # Losses within 0.1 % of each other, whose mean over half of them differs by 1e-6.
    x = 1.0 + 1e-4 * np.random.default_rng(0).normal(size=(4096, 1)).astype(np.float32)
    model, source = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), ej.ArraySource({"x": x})

    def mean(model, batch):
        return jnp.full(len(batch["x"]), jnp.mean(batch["x"] ** 2))

    with pytest.raises(ContractError, match="depends on the others"):
        ej.score(model, source, tmp_path, loss_fn=mean, batch_size=4096)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_few_examples_are_no_trouble(size, tmp_path):
    source = ej.ArraySource({"x": X[:size], "y": LABEL[:size]})
    table = score(losses, tmp_path / "table", source)
    expected = losses(Model(), {"x": X[:size], "y": LABEL[:size]})
    np.testing.assert_allclose(table.loss_N(), expected, rtol=1e-5)
    assert fit(losses, tmp_path / "fit", source).steps == 1


def test_equal_losses_and_infinite_ones_are_no_trouble(tmp_path):
    def equal(model, batch):
        return jnp.full(len(batch["y"]), np.log(2), jnp.float32)

    assert score(equal, tmp_path / "equal").temperature == np.float32(np.log(2))

    def infinite(model, batch):
        return jnp.where(batch["y"] == 1, jnp.inf, losses(model, batch))

    table = score(infinite, tmp_path / "infinite", on_bad_example="drop")
    np.testing.assert_array_equal(np.isnan(table.loss_N()), LABEL == 1)


class Normed(nnx.Module):
    """BatchNorm and dropout couple the examples of a batch, in training."""

    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.dropout(self.norm(x)))


@pytest.mark.slow
def test_batch_norm_and_dropout_in_training_are_no_trouble(tmp_path):
    assert fit(losses, tmp_path, model=ej.train_mode(Normed())).steps == 3


def test_batch_norm_of_ones_own_is_told(tmp_path):
    def centred(model, batch):
        x = batch["x"] - batch["x"].mean(axis=0, keepdims=True)
        return losses(model, {**batch, "x": x})

    with pytest.raises(ContractError, match=r"centred returns .* depends on the others"):
        fit(centred, tmp_path)


@pytest.mark.slow
def test_micro_batches_are_no_trouble(tmp_path):
    stage = dataclasses.replace(STAGE, batch_size=16, micro_batches=2)
    assert ej.fit(Model(), SOURCE, tmp_path / "a", stage=stage, loss_fn=losses).steps == 2

    def mean(model, batch):
        return _mean(losses(model, batch), batch)

    with pytest.raises(ContractError, match="depends on the others"):
        ej.fit(Model(), SOURCE, tmp_path / "b", stage=stage, loss_fn=mean)


@pytest.mark.slow
def test_packed_text(tmp_path):
    model, source = tiny_model(), packed_source()

    def own(model, batch):
        total, count, _ = ej.causal_lm_token_losses(model, batch)
        return total, count

    def mean(model, batch):
        total, count = own(model, batch)
        return jnp.full(total.shape, total.sum() / count.sum()), jnp.ones(total.shape)

    def scalar(model, batch):
        return own(model, batch)[0].sum()

    options = {"batch_size": B}
    table = ej.score(model, source, tmp_path / "own", loss_fn=own, **options)
    assert table.num_examples == 60 and 2.0 < table.temperature < 4.0  # log(16) is 2.8
    with pytest.raises(ContractError, match=r"mean returns .* depends on the others in its batch"):
        ej.score(model, source, tmp_path / "mean", loss_fn=mean, **options)
    with pytest.raises(ContractError, match=r"scalar returned a scalar; .* of shape \(8, \d+\)"):
        ej.score(model, source, tmp_path / "scalar", loss_fn=scalar, **options)
    with pytest.raises(ContractError, match=r"calls model.hidden_states.*; Model has no hidden_"):
        ej.score(Model(), source, tmp_path / "model", loss_fn=ej.causal_lm_loss, **options)


def test_the_check_compiles_nothing_when_scoring(tmp_path):
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(losses, n=1)
    for number in range(2):
        score(traced, tmp_path / str(number), model=Model(number))


def test_check_apart_of_a_single_row():
    calls = []

    def run(arrays):
        calls.append(arrays["mask"].tolist())
        return np.ones(2), np.ones(2)

    batch = {"mask": np.array([True, False]), "example_id": np.array([3, -1])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contract.check_apart(run, batch, "loss")
    assert calls == [[True, False]] * 3  # all processes run it as often
