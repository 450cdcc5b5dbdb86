"""Packing is exact: rows, batches, losses, gradients, scoring and training of packed text."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import devices_mesh
from hypothesis import given, settings
from hypothesis import strategies as st

from easy_jax.config import OptimizerConfig, StageConfig
from easy_jax.core.losses import causal_lm_loss, causal_lm_token_losses
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.data import (
    ArraySource,
    DataError,
    PackedSource,
    Ragged,
    TokenSource,
    scoring_loader,
    training_loader,
)
from easy_jax.data.packing import NO_TARGET, PackedRows, split_tokens
from easy_jax.models.transformer import Transformer
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.parallel import sharding
from easy_jax.train import loss_parts
from easy_jax.train.fitting import fit
from easy_jax.train.loss_table import LossTable, LossTableError
from easy_jax.train.scoring import score

VOCAB, SIZE, ROW = 64, 30, 24
LONGEST = 20
SHAPE = {
    "vocab": VOCAB,
    "embed": 16,
    "mlp": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "query_scale": 8**-0.5,
}
CONFIGS = {
    "llama": TransformerConfig("llama", **SHAPE),
    "gemma2": TransformerConfig(
        "gemma2", **SHAPE, windows=(4, None), attention_cap=2.0, final_cap=5.0
    ),
}
REDUCTIONS = ("token_mean", "example_mean", "weight_mean")


# Compiled in a third of the time.
FAST = {"xla_backend_optimization_level": 0}


def _large_model(family):
    """Random, with parameters so large that every token matters to those after it."""
    model = Transformer(CONFIGS[family], rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("kernel", "embedding"):
            leaf[...] = 15.0 * leaf[...]
    return model


_MODELS = {}


def _model(family="llama"):
    if family not in _MODELS:
        _MODELS[family] = _large_model(family)
    return _MODELS[family]


@functools.cache
def _logits(family):
    """A function of tokens, without segments or positions."""
    graphdef, state = nnx.split(_model(family))
    function = jax.jit(
        lambda state, tokens: nnx.merge(graphdef, state)(tokens), compiler_options=FAST
    )
    return lambda tokens: np.float64(function(state, tokens))


@functools.cache
def _examples():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LONGEST + 1, SIZE)
    offsets = np.cumsum([0, *lengths])
    return TokenSource(rng.integers(0, VOCAB, offsets[-1]), offsets, rng.integers(1, lengths))


def _of_lengths(lengths):
    offsets = np.cumsum([0, *lengths])
    return TokenSource(np.arange(offsets[-1]), offsets, np.ones(len(lengths), int))


def _packed(examples=None):
    return PackedSource(_examples() if examples is None else examples, ROW)


def _padded(examples=None):
    return PackedSource(_examples() if examples is None else examples, ROW, max_segments=1)


SOURCES = {"packed": _packed, "padded": _padded}


def _weights():
    return (np.random.default_rng(1).random(SIZE) + 0.1).astype(np.float32)


def _token_weights(examples):
    values = np.random.default_rng(2).random(examples.num_targets.sum()).astype(np.float32)
    return Ragged(values, np.cumsum([0, *examples.num_targets]))


# Rows.


@settings(deadline=None, max_examples=40, database=None)
@given(
    lengths=st.lists(st.integers(2, 21), min_size=1, max_size=60),
    spare=st.integers(0, 30),
    max_segments=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_rows_have_every_id_once_and_fit(lengths, spare, max_segments, seed):
    source = PackedSource(_of_lengths(lengths), max(lengths) - 1 + spare, max_segments)
    ids = np.random.default_rng(seed).permutation(len(lengths))
    rows = source.rows(ids)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    taken = np.array(lengths) - 1
    place = np.argsort(ids)
    for row in rows:
        assert len(row) > 0 and taken[row].sum() <= source.row_length
        assert max_segments == 0 or len(row) <= max_segments
        assert (np.diff(place[row]) > 0).all()  # in the order given
    if max_segments == 1:
        assert [row.tolist() for row in rows] == [[i] for i in ids]
    again = source.rows(ids)
    assert [row.tolist() for row in again] == [row.tolist() for row in rows]


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(2, 13, 500)
    rows = PackedSource(_of_lengths(lengths), 48).rows(np.arange(500))
    assert len(rows) <= 1.1 * np.ceil((lengths - 1).sum() / 48)


# Batches.


def _three_examples():
    tokens = [10, 11, 12, 13, 20, 21, 22, 30, 31, 32, 33, 34, 35]
    return PackedSource(TokenSource(tokens, [0, 4, 7, 13], [2, 1, 4]), row_length=6)


def test_a_batch_by_hand():
    batches = list(scoring_loader(_three_examples(), 3))
    assert len(batches) == 1
    expected = {
        "tokens": [[10, 11, 12, 20, 21, 0], [30, 31, 32, 33, 34, 0], [0] * 6],
        "targets": [[-1, 12, 13, 21, 22, -1], [-1, -1, -1, 34, 35, -1], [-1] * 6],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0], [0] * 6],
        "positions": [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0], [0] * 6],
        "example_id": [[0, 1], [2, -1], [-1, -1]],
        "mask": [[True, True], [True, False], [False, False]],
    }
    assert {name: array.tolist() for name, array in batches[0].items()} == expected
    kinds = {"example_id": np.int64, "mask": np.bool_}
    for name, array in batches[0].items():
        assert array.dtype == kinds.get(name, np.int32), name


def test_weights_of_a_batch_by_hand():
    weight_N = np.float32([0.5, 2.0, 0.25])
    (batch,) = training_loader(_three_examples(), 4, epochs=1, seed=0, weight_N=weight_N)
    for i, weight, mask in zip(
        batch["example_id"].ravel(), batch["weight"].ravel(), batch["mask"].ravel(), strict=True
    ):
        assert (weight, mask) == ((weight_N[i], True) if i >= 0 else (0.0, False))
    assert batch["weight"].dtype == np.float32 and batch["mask"].sum() == 3

    source = _three_examples()
    ragged = Ragged(np.arange(1, 7, dtype=np.float32), np.array([0, 2, 4, 6]))
    batch = PackedRows(source, 2, ragged).read([np.array([1, 0]), np.array([2])])
    assert batch["token_weight"].tolist() == [[3, 4, 0, 1, 2, 0], [0, 0, 0, 5, 6, 0]]
    assert batch["example_id"].tolist() == [[1, 0], [2, -1]]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_targets_of_a_batch_are_the_examples(kind):
    examples, seen = _examples(), []
    loader = training_loader(SOURCES[kind](), 4, epochs=2, seed=7)
    batches = list(loader)
    assert loader.steps == len(batches)
    for batch in batches:
        ids = batch["example_id"][batch["mask"]]
        for i, targets in zip(ids, split_tokens(batch, batch["targets"]), strict=True):
            record = examples[i]
            np.testing.assert_array_equal(targets, record["tokens"][record["target_start"] :])
        seen += ids.tolist()
    assert sorted(seen) == sorted(2 * list(range(SIZE)))
    assert sorted(seen[:SIZE]) == list(range(SIZE))  # one epoch after the other


def test_processes_share_the_global_batches():
    options = {"epochs": 2, "seed": 3, "weight_N": _weights()}
    whole = list(training_loader(_packed(), 4, **options))
    parts = [
        list(training_loader(_packed(), 4, rows=rows, **options))
        for rows in np.split(np.arange(4), 2)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            joined = np.concatenate([share[name] for share in shares])
            np.testing.assert_array_equal(joined, array)


# What is refused.


def test_bad_rows_are_refused():
    with pytest.raises(DataError, match=r"2 examples do not fit into a row of 6 .*ids \[1, 3\]"):
        PackedSource(_of_lengths([7, 8, 3, 9]), 6)
    assert len(PackedSource(_of_lengths([7]), 6)) == 1  # its last token is no input
    with pytest.raises(DataError, match="row_length is 0"):
        PackedSource(_of_lengths([3]), 0)
    with pytest.raises(DataError, match="max_segments -1"):
        PackedSource(_of_lengths([3]), 4, -1)


def _load(source, **options):
    return training_loader(source, 4, epochs=1, seed=0, **options)


def test_bad_weights_are_refused():
    source = _three_examples()
    offsets = np.array([0, 2, 4, 6])
    good = np.ones(6, np.float32)
    with pytest.raises(DataError, match="offsets must go up from 0 to 6"):
        Ragged(good, offsets[:3])
    with pytest.raises(DataError, match="offsets must go up from 0 to 6"):
        Ragged(good, np.array([0, 4, 2, 6]))
    with pytest.raises(DataError, match="token weights for 2 of 3 examples"):
        _load(source, token_weight=Ragged(good[:4], offsets[:3]))
    with pytest.raises(DataError, match=r"differs .* in 2 examples, ids \[0, 1\]"):
        _load(source, token_weight=Ragged(good, np.array([0, 1, 4, 6])))
    for value in (-1.0, np.nan, np.inf):
        bad = good.copy()
        bad[3] = value
        with pytest.raises(DataError, match=r"negative or not finite in example ids \[1\]"):
            _load(source, token_weight=Ragged(bad, offsets))
    unpacked = ArraySource({"x": np.zeros(3, np.float32)})
    with pytest.raises(DataError, match="token weights are for packed text"):
        _load(unpacked, token_weight=Ragged(good, offsets))
    with pytest.raises(DataError, match=r"\(2,\) weights for 3 examples"):
        _load(source, weight_N=np.ones(2))
    with pytest.raises(DataError, match=r"negative or infinite for 1 examples, ids \[2\]"):
        _load(source, weight_N=np.float32([1, 0, -1]))
    with pytest.raises(DataError, match="every weight is missing"):
        _load(source, weight_N=np.full(3, np.nan))
    with pytest.raises(DataError, match=r"duplicate example ids: \[1\]"):
        scoring_loader(source, 4, ids=np.array([0, 1, 1]))
    with pytest.raises(DataError, match=r"\[3\] are not in \[0, 3\)"):
        scoring_loader(source, 4, ids=np.array([0, 3]))


def _ids(loader):
    return sorted(np.concatenate([batch["example_id"][batch["mask"]] for batch in loader]).tolist())


def test_an_example_without_a_weight_is_left_out():
    weight_N = _weights()
    weight_N[[4, 17]] = np.nan
    kept = [i for i in range(SIZE) if i not in (4, 17)]
    assert _ids(_load(_packed(), weight_N=weight_N)) == kept
    # The same for an example dropped while scoring, which has no token weights.
    full = _token_weights(_examples())
    parts = [full[i] if i in kept else full[i][:0] for i in range(SIZE)]
    ragged = Ragged(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))
    assert _ids(_load(_packed(), weight_N=weight_N, token_weight=ragged)) == kept
    assert _ids(_load(_packed(), token_weight=ragged)) == kept


# Losses, against each example alone, in NumPy.


def _alone(junk_seed=5):
    """Each example in a row of its own, from the start; behind it anything may follow."""
    examples = _examples()
    rng = np.random.default_rng(junk_seed)
    tokens = rng.integers(0, VOCAB, (SIZE, LONGEST)).astype(np.int32)
    targets = np.full((SIZE, LONGEST), -1, np.int32)
    for i, record in enumerate(examples):
        stop, first = len(record["tokens"]) - 1, record["target_start"] - 1
        tokens[i, :stop] = record["tokens"][:-1]
        targets[i, first:stop] = record["tokens"][first + 1 :]
    return tokens, targets


@functools.cache
def _expected_token_losses(family="llama"):
    """The losses of each example's target tokens, in float64."""
    tokens, targets = _alone()
    logits = _logits(family)(tokens)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return [nll[i][targets[i] != NO_TARGET] for i in range(SIZE)]


def _expected_losses(family="llama"):
    return np.array([losses.mean() for losses in _expected_token_losses(family)])


def _score(source, directory, family="llama", devices=1, **options):
    options = {
        "batch_size": 8,
        "rows_per_part": 7,
        "loss_fn": causal_lm_token_losses,
        "token_losses": True,
        **options,
    }
    return score(_model(family), source, directory, mesh=devices_mesh(devices), **options)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("family", CONFIGS)
def test_losses_are_those_of_each_example_alone(family, kind, tmp_path):
    table = _score(SOURCES[kind](), tmp_path, family)
    expected = _expected_losses(family)
    assert expected.std() > 0.3
    np.testing.assert_allclose(table.loss_N(), expected, rtol=1e-5)
    tokens = table.token_losses()
    for i, losses in enumerate(_expected_token_losses(family)):
        np.testing.assert_allclose(tokens[i], losses, rtol=1e-5, atol=1e-5)


def test_losses_depend_on_what_comes_before():
    # Were it not so, the test above would say little about attention.
    tokens, _ = _alone()
    other = tokens.copy()
    other[:, 0] = (other[:, 0] + 1) % VOCAB
    for family in CONFIGS:
        difference = np.abs(_logits(family)(other) - _logits(family)(tokens))
        assert difference[:, 2].max(axis=-1).min() > 1e-2


# Gradients, against the sum over each example alone.


def _flat(tree):
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@functools.cache
def _per_example_gradients(with_token_weights=False):
    """d(nll_sum_i) / d(params), [SIZE, parameters], each example alone through the model."""
    tokens, targets = _alone()
    weight = np.float32(targets != NO_TARGET)
    if with_token_weights:
        weight[targets != NO_TARGET] = _token_weights(_examples()).values
    graphdef, params = nnx.split(_model())

    def nll_sum(params, tokens, targets, weight):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[None])[0])
        chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        return -jnp.sum(weight * chosen)

    gradient = jax.jit(jax.grad(nll_sum), compiler_options=FAST)
    return np.stack(
        [_flat(gradient(params, *x)) for x in zip(tokens, targets, weight, strict=True)]
    )


def _expected_gradient(reduction, weight_N, token_weights=False):
    weight = np.float64(weight_N)
    count = np.float64(_examples().num_targets)
    gradients = _per_example_gradients(token_weights)
    if reduction == "example_mean":
        return (weight / count) @ gradients / SIZE
    return weight @ gradients / (count.sum() if reduction == "token_mean" else weight @ count)


GIVE_GRADIENT = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
_COMPILED = {}


def _gradient(batch, reduction, devices=1, micro_batches=1):
    """The gradient that a step hands to its optimiser, flat, and the metrics."""
    mesh = devices_mesh(devices)
    batch = {name: array for name, array in batch.items() if name != "example_id"}
    state = init_train_state(_model(), GIVE_GRADIENT, mesh=mesh)
    sharded = sharding.shard_batch(batch, mesh)
    shapes = tuple((name, array.shape) for name, array in sorted(batch.items()))
    key = (reduction, devices, micro_batches, shapes)
    if key not in _COMPILED:
        step = make_train_step(
            nnx.graphdef(_model()),
            causal_lm_loss,
            GIVE_GRADIENT,
            reduction=reduction,
            micro_batches=micro_batches,
        )
        _COMPILED[key] = step.lower(state, sharded).compile(compiler_options=FAST)
    state, metrics = _COMPILED[key](state, sharded)
    return _flat(state.opt_state), metrics


def _batch(source, **options):
    """The whole data set in one batch; some of its rows are padding."""
    (batch,) = training_loader(source, 32, epochs=1, seed=3, **options)
    return batch


def _assert_close(actual, expected, tolerance=1e-4):
    difference = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert difference < tolerance


# Each pair of devices, micro-batches and reduction comes once: a compilation takes seconds.
SPLITS = [
    (REDUCTIONS[(i + j) % 3], devices, micro_batches)
    for i, devices in enumerate((1, 2, 8))
    for j, micro_batches in enumerate((1, 2, 4))
]


@pytest.mark.parametrize(
    ("kind", "reduction", "devices", "micro_batches"),
    [("packed", *split) for split in SPLITS] + [("padded", *split) for split in SPLITS[::4]],
)
def test_the_gradient_is_the_weighted_sum_over_the_examples(
    kind, reduction, devices, micro_batches
):
    batch = _batch(SOURCES[kind](), weight_N=_weights())
    gradient, metrics = _gradient(batch, reduction, devices, micro_batches)
    expected = _expected_gradient(reduction, _weights())
    _assert_close(gradient, expected)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(expected), rtol=1e-4)


@pytest.mark.parametrize(("kind", "devices"), [("packed", 8), ("padded", 1)])
def test_the_gradient_with_token_weights(kind, devices):
    weights = {"weight_N": _weights(), "token_weight": _token_weights(_examples())}
    batch = _batch(SOURCES[kind](), **weights)
    gradient, metrics = _gradient(batch, "token_mean", devices)
    _assert_close(gradient, _expected_gradient("token_mean", _weights(), token_weights=True))
    losses = np.concatenate(_expected_token_losses())
    weight = np.repeat(_weights(), _examples().num_targets) * weights["token_weight"].values
    np.testing.assert_allclose(metrics["loss"], weight @ losses / len(losses), rtol=1e-5)


def test_a_weight_of_one_is_no_weight():
    plain, ones = _batch(_packed()), _batch(_packed(), weight_N=np.ones(SIZE))
    chex.assert_trees_all_equal(plain, ones)
    gradient, _ = _gradient(plain, "token_mean")
    _assert_close(gradient, _expected_gradient("token_mean", np.ones(SIZE)))


def test_a_weight_of_zero_leaves_the_example_out():
    zero, missing = _weights(), _weights()
    out = [4, 17]
    zero[out], missing[out] = 0.0, np.nan
    count = _examples().num_targets
    share = {
        "weight_mean": 1.0,
        "token_mean": 1.0 - count[out].sum() / count.sum(),
    }
    # Unpacked, where shapes stay as they are; the splits were compiled above.
    source = _padded()
    for split in (("weight_mean", 2, 2), ("token_mean", 1, 1)):
        reduction = split[0]
        weighted, _ = _gradient(_batch(source, weight_N=zero), *split)
        batch = _batch(source, weight_N=missing)
        assert batch["mask"].sum() == SIZE - len(out)
        without, _ = _gradient(batch, *split)
        _assert_close(weighted, share[reduction] * without)
        _assert_close(weighted, _expected_gradient(reduction, zero))


# Scoring.


class InterruptionError(Exception):
    """Stands for a kill."""


def _stop_after(calls):
    left = iter(range(calls))

    def progress(_):
        if next(left, None) is None:
            raise InterruptionError

    return progress


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return _score(_packed(), tmp_path_factory.mktemp("table"))


def test_the_table_is_in_order_over_its_parts(tmp_path):
    table = _score(_packed(), tmp_path, batch_size=4)
    assert len(list(tmp_path.glob("part-*.parquet"))) > 1
    ids, loss, count = (np.concatenate(column) for column in zip(*table.rows(), strict=True))
    assert ids.tolist() == list(range(SIZE))
    np.testing.assert_array_equal(count, _examples().num_targets)
    np.testing.assert_allclose(loss, _expected_losses(), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "devices", "batch_size"),
    [("packed", 2, 4), ("packed", 8, 16), ("padded", 2, 16), ("padded", 8, 8)],
)
def test_losses_do_not_depend_on_the_batches(kind, devices, batch_size, table, tmp_path):
    other = _score(SOURCES[kind](), tmp_path, devices=devices, batch_size=batch_size)
    np.testing.assert_allclose(other.loss_N(), table.loss_N(), rtol=1e-5)
    np.testing.assert_allclose(
        other.token_losses().values, table.token_losses().values, rtol=1e-5, atol=1e-5
    )
    assert other.metadata["data"] == table.metadata["data"]


def test_token_losses_add_up(table):
    tokens = table.token_losses()
    ids, loss, count = (np.concatenate(column) for column in zip(*table.rows(), strict=True))
    assert len(tokens) == SIZE and table.metadata["num_tokens"] == len(tokens.values)
    for i, mean, size in zip(ids, loss, count, strict=True):
        assert len(tokens[i]) == size
        np.testing.assert_allclose(np.float64(tokens[i]).sum(), mean * size, rtol=1e-5)


def test_token_temperature_and_weights(table):
    losses = np.concatenate(list(table.token_losses()))
    assert table.token_temperature == float(np.float32(np.median(np.float64(losses))))
    weights = table.flow_token_weights()
    assert weights.values.dtype == np.float32
    for tau, found in ((None, weights), (0.7, table.flow_token_weights(0.7))):
        expected = np.exp(-np.float64(losses) / (np.median(losses) if tau is None else tau))
        np.testing.assert_allclose(found.values, expected, rtol=2e-5, atol=1e-38)
    # They are what a packed loader takes.
    (batch,) = training_loader(_packed(), 32, epochs=1, seed=0, token_weight=weights)
    ids = batch["example_id"][batch["mask"]]
    for i, values in zip(ids, split_tokens(batch, batch["token_weight"]), strict=True):
        np.testing.assert_array_equal(values, weights[i])


def test_a_table_without_token_losses(table, tmp_path):
    plain = _score(_packed(), tmp_path, loss_fn=causal_lm_loss, token_losses=False)
    np.testing.assert_allclose(plain.loss_N(), table.loss_N(), rtol=1e-5)
    assert plain.temperature == float(np.median(plain.loss_N()))
    for use in (
        lambda: plain.token_temperature,
        plain.token_losses,
        plain.flow_token_weights,
    ):
        with pytest.raises(LossTableError, match="no token losses; score again, with token_losses"):
            use()


@pytest.mark.parametrize("kind", SOURCES)
def test_interrupted_scoring_is_completed(kind, tmp_path):
    options = {"batch_size": 4}
    whole = _score(SOURCES[kind](), tmp_path / "whole", **options)
    batches = scoring_loader(SOURCES[kind](), 4).steps
    with pytest.raises(InterruptionError):
        _score(SOURCES[kind](), tmp_path / "parts", progress=_stop_after(batches - 2), **options)
    saved = loss_parts.seen_ids(tmp_path / "parts", SIZE)
    assert 0 < saved.sum() < SIZE
    with pytest.raises(LossTableError, match="is incomplete"):
        LossTable.open(tmp_path / "parts")
    parts = _score(SOURCES[kind](), tmp_path / "parts", **options)
    np.testing.assert_array_equal(parts.loss_N(), whole.loss_N())
    chex.assert_trees_all_equal(list(parts.token_losses()), list(whole.token_losses()))
    assert parts.metadata == whole.metadata
    # Complete: nothing is scored again.
    _score(SOURCES[kind](), tmp_path / "parts", progress=_stop_after(0), **options)


def test_a_table_of_other_data_is_refused(table):
    examples = _examples()
    start = examples.target_start.copy()
    start[3] = 3 - min(start[3], 2)
    other = TokenSource(examples.tokens, examples.offsets, start)
    with pytest.raises(LossTableError, match="data is '"):
        _score(_packed(other), table.directory)
    # Another packing is no other data: the table is opened.
    again = _score(_padded(), table.directory, progress=_stop_after(0))
    assert again.fingerprint() == table.fingerprint()


def test_a_bad_token_is_reported_with_its_example_alone(table, tmp_path):
    examples = _examples()
    # In company: the second of a row with two or more.
    bad = next(int(row[1]) for row in _packed().rows(np.arange(SIZE)) if len(row) > 1)
    tokens = examples.tokens.copy()
    tokens[examples.offsets[bad + 1] - 1] = VOCAB + 3
    source = _packed(TokenSource(tokens, examples.offsets, examples.target_start))
    message = rf"token id {VOCAB + 3} \(in 1 examples, ids \[{bad}\]\), the model a vocabulary of"
    with pytest.raises(DataError, match=message):
        _score(source, tmp_path)
    dropped = _score(source, tmp_path, on_bad_example="drop")
    assert dropped.metadata["dropped_ids"] == [bad]
    kept = np.arange(SIZE) != bad
    np.testing.assert_array_equal(np.isnan(dropped.loss_N()), ~kept)
    np.testing.assert_allclose(dropped.loss_N()[kept], table.loss_N()[kept], rtol=1e-5)
    assert len(dropped.token_losses()[bad]) == 0
    weights = dropped.flow_token_weights()
    assert _ids(_load(source, token_weight=weights)) == np.flatnonzero(kept).tolist()


# Training.


def test_resumed_training_is_uninterrupted_bit_for_bit(table, tmp_path):
    # One compilation of the step for all of it: every batch has the same shape.
    chex.clear_trace_counter()

    def loss(model, batch):
        return causal_lm_loss(model, batch)

    loss_fn = chex.assert_max_traces(loss, n=2)  # of the step, and of the check of its contract
    optimizer = OptimizerConfig(name="adamw", learning_rate=0.01, warmup_ratio=0.2)
    stage = StageConfig(
        epochs=2, batch_size=4, micro_batches=2, reduction="weight_mean", optimizer=optimizer
    )
    options = {
        "stage": stage,
        "loss_fn": loss_fn,
        "weight_N": table.flow_weights(),
        "seed": 5,
        "mesh": devices_mesh(2),
        "save_every_steps": 3,
    }
    source, model = _packed(), _model()
    before = _flat(nnx.state(model))
    whole = fit(model, source, tmp_path / "whole", **options)
    loader = training_loader(source, 4, epochs=2, seed=5)
    assert (whole.steps, whole.resumed_from) == (loader.steps, 0)
    assert 6 < loader.steps < 2 * SIZE / 4
    for stop_after in (5, 1):  # both between checkpoints
        with pytest.raises(InterruptionError):
            fit(model, source, tmp_path / "parts", progress=_stop_after(stop_after), **options)
    parts = fit(model, source, tmp_path / "parts", **options)
    assert (parts.steps, parts.resumed_from) == (loader.steps, 3)
    chex.assert_trees_all_equal(
        jax.device_get(parts.model_state), jax.device_get(whole.model_state)
    )
    np.testing.assert_array_equal(_flat(nnx.state(model)), before)
    assert np.abs(_flat(whole.model_state) - before).max() > 1e-2
