"""Weights as columns: exported for other trainers, and read from records."""

import json

import numpy as np
import packed
import pyarrow.parquet as pq
import pytest
import tiny_language
from forks import Forked
from test_text_warnings import TEXT, _config, words

import easy_jax as ej
from easy_jax.data import DataError, DataWarning, Ragged, instructions, training_loader
from easy_jax.data.bad_examples import BadExamples
from easy_jax.io.checks import ConfigError
from easy_jax.train.loss_table import LossTable


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Losses of all target tokens of the packed examples."""
    folder = tmp_path_factory.mktemp("table")
    packed.score_rows(packed.source(), folder, token_losses=True)
    return LossTable.open(folder)


def _read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
@pytest.mark.parametrize("name,level", [("flow", "weight"), ("stm", "token_weights")])
def test_the_file_has_the_weights_that_training_uses(table, tmp_path, name, level, ending):
    texts = [f"text {i}" for i in range(packed.SIZE)]
    path = ej.export_weights(table, tmp_path / f"w{ending}", name, columns={"text": texts})
    rows = _read(path)
    assert [row["example_id"] for row in rows] == list(range(packed.SIZE))
    assert [row["text"] for row in rows] == texts
    np.testing.assert_allclose([row["loss"] for row in rows], table.loss_N(), rtol=1e-6)
    np.testing.assert_array_equal([row["count"] for row in rows], packed.examples().num_targets)
    losses = table.token_losses()
    for i, row in enumerate(rows):
        np.testing.assert_allclose(row["token_losses"], losses[i], rtol=1e-6)
    assert {"weight", "token_weights"} & set(rows[0]) == {level}
    if name == "flow":
        expected = np.exp(-np.float64(table.loss_N()) / table.temperature)
        np.testing.assert_allclose([row["weight"] for row in rows], expected, rtol=1e-5)
    else:
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(row["token_weights"], np.exp(-losses[i]) >= 0.4)


@pytest.mark.slow
def test_own_weights_are_multiplied_in(table, tmp_path):
    weight_N = np.linspace(0.5, 2.0, packed.SIZE)
    token_weight = Ragged(
        np.full_like(table.token_losses().values, 0.5), table.token_losses().offsets
    )
    own = {"weight_N": weight_N, "token_weight": token_weight}
    rows = _read(ej.export_weights(table, tmp_path / "w.jsonl", "flow", **own))
    np.testing.assert_allclose(
        [row["weight"] for row in rows], weight_N * table.flow_weights(), rtol=1e-6
    )
    assert all(set(row["token_weights"]) == {0.5} for row in rows)
    rows = _read(ej.export_weights(table, tmp_path / "w.jsonl", "none"))
    assert all(row["weight"] == 1.0 for row in rows)


def _points_table(tmp_path, losses):
    import jax.numpy as jnp
    from flax import nnx
    from helpers import devices_mesh

    loss_B = jnp.asarray(losses, jnp.float32)
    return ej.score(
        nnx.Linear(1, 1, rngs=nnx.Rngs(0)),
        ej.ArraySource({"i": np.arange(len(losses), dtype=np.int32)}),
        tmp_path / "table",
        loss_fn=lambda model, batch: loss_B[batch["i"]],
        batch_size=4,
        mesh=devices_mesh(1),
        on_bad_example="drop",
    )


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_dropped_examples_have_nulls(tmp_path, ending):
    table = _points_table(tmp_path, [1.0, np.nan, 3.0])
    rows = _read(ej.export_weights(table, tmp_path / f"w{ending}"))
    assert rows[1] == {"example_id": 1, "loss": None, "count": None, "weight": None}
    np.testing.assert_allclose([rows[0]["weight"], rows[2]["weight"]], np.exp([-0.5, -1.5]))


def test_what_cannot_be_exported_is_refused(tmp_path):
    table = _points_table(tmp_path, [1.0, 2.0, 3.0])
    for arguments, message in (
        (("w.csv", "flow"), r"w\.csv ends in '\.csv'; it must be \.parquet or \.jsonl"),
        (("w.jsonl", "dft"), r"Dft.* computes weights from the model in every step"),
        (("w.jsonl", "iw"), r"Iw.* computes weights from the model in every step"),
        (("w.jsonl", "folw"), r"did you mean 'flow'"),
    ):
        with pytest.raises(ConfigError, match=message):
            ej.export_weights(table, tmp_path / arguments[0], arguments[1])
    with pytest.raises(ConfigError, match="'loss' is one of the exported ones"):
        ej.export_weights(table, tmp_path / "w.jsonl", columns={"loss": [1, 2, 3]})
    with pytest.raises(DataError, match=r"'text' has 2 values, and .* 3 examples"):
        ej.export_weights(table, tmp_path / "w.jsonl", columns={"text": ["a", "b"]})
    assert not list(tmp_path.glob("w.*"))


def test_own_token_weights_of_dropped_examples_go_nowhere(tmp_path):
    """Neither into the example before, nor into an error."""
    table = _points_table(tmp_path, [1.0, np.nan, 3.0])
    own = Ragged(np.float32([0.1, 0.2, 0.3]), np.arange(4))
    rows = _read(ej.export_weights(table, tmp_path / "w.jsonl", "flow", token_weight=own))
    found = [row["token_weights"] for row in rows]
    assert found == [[pytest.approx(0.1)], None, [pytest.approx(0.3)]]
    assert rows[1]["weight"] is None


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"weight_N": np.array([1.0, -1.0, 1.0])}, r"infinite for 1 examples, ids \[1\]"),
        ({"weight_N": np.array([1.0, np.inf, 1.0])}, r"infinite for 1 examples, ids \[1\]"),
        ({"weight_N": np.ones(2)}, r"weight"),
        ({"token_weight": Ragged(np.ones(4, "f"), np.array([0, 2, 3, 4]))}, r"ids \[0\]"),
        ({"token_weight": Ragged(-np.ones(3, "f"), np.arange(4))}, r"negative .* \[0, 1, 2\]"),
        ({"token_weight": Ragged(np.ones(2, "f"), np.arange(3))}, r"for 2 of 3 examples"),
        ({"columns": {"text": ["a", 1, "b"]}}, r"the column 'text' cannot be written"),
        ({"columns": {"text": ["a", "\ud800", "b"]}}, r"the column 'text' cannot be written"),
    ],
)
def test_bad_weights_and_columns_are_refused(tmp_path, own, message):
    table = _points_table(tmp_path, [1.0, 2.0, 3.0])
    for name in ("none", "flow"):
        with pytest.raises(DataError, match=message):
            ej.export_weights(table, tmp_path / "w.jsonl", name, **own)
    assert not (tmp_path / "w.jsonl").exists()


def test_a_weight_that_is_missing_is_null(tmp_path):
    table = _points_table(tmp_path, [1.0, 2.0, 3.0])
    weight_N = np.array([1.0, np.nan, 0.5])
    rows = _read(ej.export_weights(table, tmp_path / "w.jsonl", "none", weight_N=weight_N))
    assert [row["weight"] for row in rows] == [1.0, None, 0.5]


# Token weights of records.

ROWS = [
    {"q": "a", "r": "b c", "w": [1, 0.5, 0]},
    {"q": "b", "r": "c", "w": [2.0, 0.25]},
]


def test_token_weights_of_records_reach_the_batches(tmp_path):
    config = _config(tmp_path, ROWS, token_weight_field="w")
    source = instructions.load(config, TEXT, words())
    (batch,) = list(training_loader(source, 8, epochs=1, seed=0, rows=np.arange(8)))
    found = [
        batch["token_weight"][r][(batch["targets"][r] >= 0) & (batch["segment_ids"][r] == s + 1)]
        for i in range(2)
        for r, s in [np.argwhere(batch["example_id"] == i)[0]]
    ]
    assert [list(values) for values in found] == [[1.0, 0.5, 0.0], [2.0, 0.25]]
    given = Ragged(np.float32([0.5, 0.5, 0.5, 3.0, 4.0]), np.array([0, 3, 5]))
    loader = training_loader(source, 8, epochs=1, seed=0, token_weight=given, rows=np.arange(8))
    assert next(iter(loader))["token_weight"].sum() == 0.75 + 6.0 + 1.0
    with pytest.warns(DataWarning, match="not read: 'w'"):
        plain = instructions.load(_config(tmp_path, ROWS), TEXT, words())
    assert plain.examples.fingerprint() != source.examples.fingerprint()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"not that of target tokens \(1\): line 2 \[1 token weights, 2 target tokens\]"),
        ([], r"not that of target tokens \(1\): line 2 \[0 token weights, 2 target tokens\]"),
        ([1.0, float("nan")], r"a token weight is not a finite .* \(1\): line 2 \[nan\]"),
        ([1.0, -0.5], r"a token weight is not a finite .* \(1\): line 2 \[-0.5\]"),
        ([1.0, 10**400], r"a token weight is not a finite .* \(1\): line 2 \[1000"),
        ([1.0, 1e39], r"a token weight is not a finite .* \(1\): line 2 \[1e\+39\]"),
        ([1.0, "x"], r"a token weight is not a finite .* \(1\): line 2 \['x'\]"),
        ([1.0, [2.0]], r"a token weight is not a finite .* \(1\): line 2 \[\[2.0\]\]"),
        ("1 1", r"token weights are not a list of numbers \(1\): line 2 \['1 1'\]"),
        (None, r"token weights are not a list of numbers \(1\): line 2 \[None\]"),
        (1.0, r"token weights are not a list of numbers \(1\): line 2 \[1.0\]"),
    ],
)
def test_bad_token_weights_are_refused_or_dropped(tmp_path, weights, message):
    rows = [ROWS[0], {**ROWS[1], "w": weights}]
    config = _config(tmp_path, rows, token_weight_field="w")
    with pytest.raises(DataError, match=message):
        instructions.load(config, TEXT, words())
    with pytest.warns(DataWarning, match="left out 1 of 2 examples"):
        source = instructions.load(config, TEXT, words(), BadExamples("drop")).examples
    assert source.dropped_ids.tolist() == [1]
    assert source.token_weight.values.tolist() == [1.0, 0.5, 0.0]


def test_a_misspelt_field_is_named(tmp_path):
    config = _config(tmp_path, ROWS, token_weight_field="wz")
    with (
        pytest.warns(DataWarning, match="not read"),
        pytest.raises(DataError, match="no record has token weights: is the name of their field"),
    ):
        instructions.load(config, TEXT, words())


@pytest.mark.slow
def test_the_command_line_writes_what_another_run_reads(root, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    tiny_language.write_folder(folder)
    config = f"--config={root}/tests/tiny_language.py:{folder}"
    output = folder / "weighted.jsonl"
    arguments = [config, f"--workdir={tmp_path / 'run'}", f"--output={output}"]

    def run(*arguments):
        process = Forked(arguments, root)
        out, err = process.communicate()
        return process.returncode, out, err

    code, out, err = run("export-weights", *arguments, "--weighting=stm,threshold=0.05")
    assert code == 0 and str(output) in out, err
    rows = _read(output)
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [{"q": row["q"], "a": row["a"]} for row in rows] == records
    weights = np.concatenate([row["token_weights"] for row in rows])
    assert 0 < weights.mean() < 1
    fields = ["--config.train.path=" + str(output), "--config.train.token_weight_field"]
    code, out, err = run(
        "train",
        config,
        f"--workdir={tmp_path / 'next'}",
        "=".join([fields[1], "token_weights"]),
        fields[0],
        "--config.only=flow",
    )
    assert code == 0 and "own token weights from 0 to 1" in out, err
    code, _, err = run("export-weights", *arguments, "--weighting=stm,0.05")
    assert code == 2 and "'0.05' is no OPTION=VALUE" in err
    code, _, err = run("export-weights", *arguments[:2], "--weighting=shuffled", "--config.seed=3")
    assert code == 2 and "belongs to another configuration" in err
    code, out, err = run("export-weights", *arguments[:2], "--weighting=shuffled")
    assert code == 0, err
    found = [row["weight"] for row in _read(tmp_path / "run" / "exported" / "weights.parquet")]
    seed = tiny_language.get_config(str(folder)).seed
    scored = LossTable.open(tmp_path / "run" / "loss_table")
    expected = ej.weightings.get("shuffled").of_table(scored, seed).weight_N
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    code, _, err = run("export-weights", *arguments[:2], f"--output={folder / 'train.jsonl'}")
    assert code == 2 and "would be written over the training data" in err
    code, _, err = run("export-weights", *arguments, "--weighting=eaft")
    assert code == 2 and "computes weights from the model in every step" in err
