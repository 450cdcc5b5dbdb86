"""Bad input: every mistake gets an error of the right type that names it."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from helpers import Records

from configs import quickstart
from easy_jax import pipeline as train
from easy_jax.config import ConfigError, MeshConfig, OptimizerConfig, StageConfig, replace
from easy_jax.core import step, weightings
from easy_jax.core.losses import softmax_cross_entropy, squared_error
from easy_jax.data import ArraySource, DataError, DataWarning, scoring_loader, training_loader
from easy_jax.parallel import sharding
from easy_jax.train import loss_parts
from easy_jax.train.checkpoint import Checkpointer, CheckpointError
from easy_jax.train.fitting import TrainingError, fit
from easy_jax.train.loss_table import LossTable, LossTableError
from easy_jax.train.scoring import ScoringError, score


def linear(seed=0, outputs=3):
    return nnx.Linear(2, outputs, rngs=nnx.Rngs(seed))


def classify(model, batch):
    return softmax_cross_entropy(model(batch["x"]), batch["label"])


def regress(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def points(size=20, bad_label=None, value=3):
    rng = np.random.default_rng(0)
    label = rng.integers(3, size=size).astype(np.int32)
    x = rng.normal(size=(size, 2)).astype(np.float32)
    if bad_label is None:
        return ArraySource({"x": x, "label": label})
    # Labels in memory would be looked at before anything is computed.
    label[bad_label] = value
    return Records([{"x": x[i], "label": label[i]} for i in range(size)])


# The command line and the configuration.

COMMANDS = {
    "field": (":tiny", "--config.finetune.optimizer.lr=1"),
    "argument": (":nope",),
    "value": (":tiny", "--config.finetune.optimizer.learning_rate=-1"),
}


@pytest.fixture(scope="module")
def command_lines(root, tmp_path_factory):
    """`easy-jax run` with every mistake in COMMANDS, all at once; none gets to train."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(root)
    workdir = tmp_path_factory.mktemp("cli") / "w"
    started = {
        name: subprocess.Popen(
            [
                *(sys.executable, "-m", "easy_jax.main", "run", f"--workdir={workdir}"),
                f"--config=configs/quickstart.py{argument}",
                *overrides,
            ],
            cwd=root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (argument, *overrides) in COMMANDS.items()
    }
    outputs = {name: process.communicate(timeout=600) for name, process in started.items()}
    assert not workdir.exists()
    return {name: (started[name].returncode, *outputs[name]) for name in COMMANDS}


def test_unknown_field_on_the_command_line(command_lines):
    code, out, err = command_lines["field"]
    assert code == 2
    (line,) = err.strip().splitlines()
    assert re.search(r"\blr\b", line) and "OptimizerConfig" in line
    assert "Traceback" not in out + err


def test_unknown_argument_on_the_command_line(command_lines):
    code, _, err = command_lines["argument"]
    assert code != 0
    assert re.search(r"quickstart\.py:nope is unknown; use .*noisy.*tiny", err)


def test_bad_value_on_the_command_line(command_lines):
    code, out, err = command_lines["value"]
    assert code == 2
    (line,) = err.strip().splitlines()
    assert "config.finetune.optimizer.learning_rate is -1.0" in line
    assert "Traceback" not in out + err


def test_unknown_configuration_argument():
    with pytest.raises(ValueError, match=r"nope is unknown; use .*noisy.*tiny"):
        quickstart.get_config("nope")


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_impossible_learning_rate(rate):
    tiny = quickstart.get_config("tiny")
    config = replace(tiny, {"pretrain.optimizer.learning_rate": rate})
    with pytest.raises(
        ConfigError, match=r"config\.pretrain\.optimizer\.learning_rate is .*finite"
    ):
        config.validate()
    config = replace(tiny, learning_rates=(0.1, rate))
    with pytest.raises(ConfigError, match=r"config\.learning_rates is .*at least 0"):
        config.validate()


WRONG_TYPES = {
    "pretrain.epochs": ("3", "of type int"),
    "probe.batch_size": (64.0, "of type int"),
    "finetune.optimizer.momentum": ("0.9", "of type float"),
    "finetune.optimizer.weight_decay": (True, "of type float"),
    "pretrain.optimizer.anchor_per_parameter": (1, "of type bool"),
    "seeds": ([0], "a tuple"),
    "learning_rates": (("0.1",), "of type float"),
    "pretrain.reduction": ("mean", "one of"),
    "name": (None, "of type str"),
}


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_wrong_type_in_a_field(field):
    value, expected = WRONG_TYPES[field]
    config = replace(quickstart.get_config("tiny"), {field: value})
    with pytest.raises(ConfigError, match=rf"config\.{re.escape(field)} is .*must be {expected}"):
        config.validate()


# Data.


def test_empty_data_set():
    with pytest.raises(DataError, match="data set is empty"):
        ArraySource({"x": np.zeros((0, 2))})
    with pytest.raises(DataError, match="data set is empty"):
        ArraySource({})
    with pytest.raises(DataError, match="data set is empty"):
        scoring_loader(Records([]), 8)
    with pytest.raises(DataError, match="data set is empty"):
        training_loader(Records([]), 8, epochs=1, seed=0)


def test_fields_of_unequal_length():
    with pytest.raises(DataError, match=r"unequal lengths: \{'x': 3, 'label': 2\}"):
        ArraySource({"x": np.zeros((3, 2)), "label": np.zeros(2, int)})


@pytest.mark.parametrize("bad", [-1, 10])
def test_label_out_of_range(bad):
    label = np.arange(10)
    label[[2, 7]] = bad
    with pytest.raises(DataError, match=r"'label' is out of range for 10 classes.*ids \[2, 7\]"):
        ArraySource({"label": label}, num_classes=10)


def test_label_that_is_no_integer():
    with pytest.raises(DataError, match=r"'label' has dtype float64; labels are integers"):
        ArraySource({"label": np.zeros(3)}, num_classes=2)


@pytest.mark.parametrize("bad", [-1, 3])
def test_label_out_of_range_while_scoring(bad, tmp_path):
    source = points(bad_label=[5, 13], value=bad)
    with pytest.raises(ScoringError, match=r"2 of 20 .*id 5 has loss nan; id 13 has loss nan"):
        score(linear(), source, tmp_path, loss_fn=classify, batch_size=8)


def test_label_out_of_range_while_training(tmp_path):
    # The 20 examples are one padded batch, so the bad one is in step 1.
    with pytest.raises(TrainingError, match=r"probe: the loss is nan at step 1\b") as error:
        fit(
            linear(),
            points(bad_label=11),
            tmp_path,
            stage=StageConfig(batch_size=24),
            loss_fn=classify,
            name="probe",
        )
    listed = json.loads(re.search(r"example ids (\[.*?\])", str(error.value))[1])
    assert len(listed) == 10
    assert set(listed) <= set(range(20))
    assert "learning rate" in str(error.value)


def test_training_error_names_the_step_and_its_examples(tmp_path):
    source = points(bad_label=11)
    batches = list(training_loader(source, 8, epochs=2, seed=0))
    step_, ids = next(
        (number, batch["example_id"].tolist())
        for number, batch in enumerate(batches, start=1)
        if 11 in batch["example_id"]
    )
    with pytest.raises(TrainingError, match=rf"at step {step_}, on example ids") as error:
        fit(
            linear(),
            source,
            tmp_path,
            stage=StageConfig(epochs=2, batch_size=8),
            loss_fn=classify,
        )
    assert str([i for i in ids if i >= 0]) in str(error.value)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The loss need not show them: here the broken parameter reaches no logit."""

    class WithUnused(nnx.Module):
        def __init__(self):
            self.used = linear()
            self.unused = nnx.Param(jax.numpy.array([1.0, np.nan]))

        def __call__(self, x):
            return self.used(x)

    with pytest.raises(TrainingError, match=r"after step 3 in \.params\['unused'\]") as error:
        fit(WithUnused(), points(), tmp_path, stage=StageConfig(batch_size=8), loss_fn=classify)
    assert "learning rate" in str(error.value)
    assert Checkpointer(tmp_path, {}).latest_step() is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_image(bad):
    image = np.zeros((6, 4, 4, 1), np.float32)
    image[[1, 4], 2, 3, 0] = bad
    with pytest.raises(DataError, match=r"'image' has NaN or infinite values.*ids \[1, 4\]"):
        ArraySource({"image": image})


@pytest.mark.parametrize(
    "make", [lambda s: scoring_loader(s, 8), lambda s: training_loader(s, 8, epochs=1, seed=0)]
)
def test_nan_image_in_a_loader(make):
    records = [{"image": np.full((4, 4, 1), i, np.float32)} for i in range(20)]
    records[13]["image"][0, 0, 0] = np.nan
    with pytest.raises(
        DataError, match=r"'image' has NaN or infinite values in example ids \[13\]"
    ):
        list(make(Records(records)))


def test_duplicate_ids_for_a_loader():
    with pytest.raises(DataError, match=r"duplicate example ids: \[3, 7\]"):
        scoring_loader(points(), 8, ids=np.array([3, 1, 3, 7, 7]))


def test_unequal_shapes():
    records = [{"x": np.zeros(2 + (i == 4), np.float32)} for i in range(8)]
    with pytest.raises(DataError, match=r"'x' of example 4 has shape \(3,\), .*example 0 \(2,\)"):
        list(scoring_loader(Records(records), 8))


def test_unequal_fields():
    records = [{"x": np.zeros(2)} for _ in range(8)]
    records[5] = {"z": np.zeros(2)}
    with pytest.raises(DataError, match=r"example 5 has fields \['z'\], example 0 \['x'\]"):
        list(scoring_loader(Records(records), 8))


@pytest.mark.parametrize("name", ["example_id", "mask"])
def test_reserved_field_name(name):
    source = ArraySource({"x": np.zeros((3, 2)), name: np.zeros(3)})
    with pytest.raises(DataError, match=rf"fields \['{name}'\], which the loader makes itself"):
        list(scoring_loader(source, 8))


# Weights.


@pytest.mark.parametrize(
    ("weight_N", "message"),
    [
        (np.ones(19), r"\(19,\) weights for 20 examples"),
        (np.ones((20, 1)), r"\(20, 1\) weights for 20 examples"),
        (np.where(np.arange(20) == 6, -0.5, 1.0), r"infinite for 1 examples, ids \[6\]"),
        (np.where(np.arange(20) == 9, np.inf, 1.0), r"infinite for 1 examples, ids \[9\]"),
        (np.full(20, np.nan), "no example is left to train on"),
    ],
    ids=["length", "rank", "negative", "infinite", "none"],
)
def test_bad_weights(weight_N, message):
    with pytest.raises(DataError, match=message):
        training_loader(points(), 8, epochs=1, seed=0, weight_N=weight_N)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0, 2.0, -3.0], r"'weight' is negative in example ids \[1, 3\]"),
        ([np.ones(2)] * 4, r"must be a number per example; in example \d it has shape \(2,\)"),
    ],
)
def test_bad_weight_field(weights, message):
    source = Records([{"x": np.zeros(2, np.float32), "weight": weight} for weight in weights])
    with pytest.raises(DataError, match=message):
        list(training_loader(source, 8, epochs=1, seed=0))


# Loss tables.


@pytest.fixture
def table(tmp_path):
    """A complete table of 20 examples in parts of 8, 8 and 4 rows."""
    return score(
        linear(), points(), tmp_path / "t", loss_fn=classify, batch_size=8, rows_per_part=8
    )


def other_loss(model, batch):
    return classify(model, batch)


@pytest.mark.parametrize(
    ("model", "source", "loss_fn", "named"),
    [
        (linear(1), points(), classify, "model"),
        (linear(), points(bad_label=0, value=1), classify, "data"),
        (linear(), points(), other_loss, "loss"),
    ],
    ids=["model", "data", "loss"],
)
def test_loss_table_of_something_else(table, model, source, loss_fn, named):
    before = {path: path.read_bytes() for path in table.directory.iterdir()}
    with pytest.raises(LossTableError, match="is of something else") as error:
        score(model, source, table.directory, loss_fn=loss_fn, batch_size=8)
    assert re.findall(r"(\w+) is '", str(error.value)) == [named]
    assert {path: path.read_bytes() for path in table.directory.iterdir()} == before


def test_loss_table_of_a_data_set_of_another_size(table):
    with pytest.raises(LossTableError, match="num_examples is 20 there and 24 here"):
        score(linear(), points(24), table.directory, loss_fn=classify, batch_size=8)


def test_check_names_what_differs(table):
    table.check(model=table.metadata["model"])
    with pytest.raises(LossTableError, match=r"model is '\w+' there and 'another' here"):
        table.check(model="another", data=table.metadata["data"])


def test_missing_rows(table):
    parts = sorted(table.directory.glob("part-*.parquet"))
    assert len(parts) == 3
    parts[1].unlink()
    with pytest.raises(LossTableError, match=r"no row for 8 of 20 examples, ids \[8, 9, 10"):
        LossTable.open(table.directory)


def test_parts_that_overlap(table):
    loss_parts.write_part(
        table.directory, 7, (np.array([4, 17]), np.float32([1, 1]), np.float32([1, 1]))
    )
    with pytest.raises(
        LossTableError, match=r"duplicate example ids with different losses: \[4, 17\]"
    ):
        LossTable.open(table.directory)


def test_part_with_ids_of_no_example(table):
    loss_parts.write_part(table.directory, 7, (np.array([20]), np.float32([1]), np.float32([1])))
    with pytest.raises(LossTableError, match=r"ids \[20\], outside of \[0, 20\)"):
        LossTable.open(table.directory)


def truncate(content):
    return content[: len(content) // 2]


def garble_footer(content):
    return content[:-20] + b"\x00" * 20


def garble_rows(content):
    """Destroys the rows; the footer, which has the schema, stays whole."""
    return content[:4] + b"\xff" * 100 + content[104:]


@pytest.mark.parametrize("damage", [lambda content: b"", truncate, garble_footer, garble_rows])
def test_damaged_part(table, damage):
    path = table.directory / "part-00000-00001.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LossTableError, match=r"part-00000-00001\.parquet is damaged"):
        LossTable.open(table.directory)


def test_one_flipped_bit_in_a_part(table):
    path = table.directory / "part-00000-00001.parquet"
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(1)
    assert column.path_in_schema == "loss"
    start = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
    content = bytearray(path.read_bytes())
    content[start + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LossTableError, match=r"part-00000-00001\.parquet is damaged"):
        LossTable.open(table.directory)


def test_part_with_other_columns(table):
    path = table.directory / "part-00000-00001.parquet"
    pq.write_table(pa.table({"example_id": np.arange(8), "loss": np.zeros(8)}), path)
    with pytest.raises(LossTableError, match=r"part-00000-00001\.parquet has columns"):
        LossTable.open(table.directory)


def test_damaged_metadata(table):
    (table.directory / "metadata.json").write_text("{")
    with pytest.raises(LossTableError, match=r"metadata\.json is not JSON"):
        LossTable.open(table.directory)


def test_no_loss_table(tmp_path):
    with pytest.raises(LossTableError, match=r"no loss table in .*no metadata\.json"):
        LossTable.open(tmp_path / "nowhere")


def test_all_losses_zero():
    with pytest.raises(ValueError, match=r"median loss is 0\.0; the temperature must be positive"):
        weightings.temperature(np.zeros(5, np.float32))
    with pytest.raises(ValueError, match=r"the temperature must be positive"):
        weightings.flow_weights(np.array([0.0, 0.0, 0.0, 2.0, 3.0]))


def test_all_losses_zero_in_a_table(tmp_path):
    model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    x = np.eye(2, dtype=np.float32)[np.arange(20) % 2]
    y = np.asarray(model.kernel[...])[np.arange(20) % 2]
    source = ArraySource({"x": x, "y": y})
    table = score(model, source, tmp_path, loss_fn=regress, batch_size=8)
    assert table.temperature == 0.0
    with pytest.raises(LossTableError, match=r"temperature .* is 0\.0; it must be positive"):
        table.flow_weights()
    with pytest.warns(DataWarning, match="all weights are 1, because all losses are equal"):
        np.testing.assert_array_equal(table.flow_weights(tau=1.0), np.ones(20))


def test_negative_loss(tmp_path):
    def negative(model, batch):
        loss, count = regress(model, batch)
        return jnp.where(batch["x"][:, 0] == 1, -1.0, loss), count

    x = np.stack([np.arange(20), np.zeros(20)], axis=1).astype(np.float32)
    source = ArraySource({"x": x, "y": np.zeros((20, 3), np.float32)})
    with pytest.raises(ScoringError, match=r"1 of 20 .*id 1 has loss -1"):
        score(linear(), source, tmp_path, loss_fn=negative, batch_size=8)


# Workdirs and checkpoints.


@pytest.fixture
def config():
    return quickstart.get_config("tiny")


def test_workdir_that_cannot_be_written(config, tmp_path):
    # Permissions do not stop root, who runs the tests in CI; these do.
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "workdir", "/proc/easy_jax/workdir"):
        with pytest.raises(ConfigError, match=rf"cannot write to the workdir {path}.*--workdir"):
            train.run(config, path)


def test_workdir_of_another_configuration(config, tmp_path):
    train.open_workdir(config, tmp_path)
    train.open_workdir(quickstart.get_config("tiny"), tmp_path)
    config = replace(config, {"finetune.optimizer.momentum": 0.5}, seeds=(0, 1))
    with pytest.raises(ConfigError, match="belongs to another configuration") as error:
        train.run(config, tmp_path)
    message = str(error.value)
    assert "config.finetune.optimizer.momentum: 0.5 now, 0.9 there" in message
    assert "config.seeds: [0, 1] now, [0] there" in message
    assert message.count(" there") == 2
    assert "--workdir" in message


def test_workdir_with_a_damaged_configuration(config, tmp_path):
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match=r"config\.json"):
        train.open_workdir(config, tmp_path)


def small_fit(directory, **changes):
    arguments = {
        "source": points(),
        "stage": StageConfig(batch_size=8),
        "loss_fn": classify,
        "seed": 0,
        "weight_N": np.ones(20, np.float32),
    }
    arguments |= changes
    return fit(linear(), arguments.pop("source"), directory, **arguments)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    assert small_fit(directory).steps == 3
    return directory


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("seed", {"seed": 1}),
        ("the weights", {"weight_N": np.full(20, 0.5, np.float32)}),
        ("the weights", {"weight_N": None}),
        ("sfa_beta", {"sfa_beta": 0.5}),
        (
            "stage.optimizer.learning_rate",
            {"stage": StageConfig(batch_size=8, optimizer=OptimizerConfig(learning_rate=0.5))},
        ),
    ],
)
def test_checkpoint_of_another_run(checkpoints, named, changes):
    with pytest.raises(CheckpointError, match=r"of another run: .* Use another directory") as error:
        small_fit(checkpoints, **changes)
    _, differing = str(error.value).split("of another run: ")
    assert re.findall(r"(?:^|; )([\w. ]+): ", differing) == [named]


def test_checkpoint_of_the_same_run_is_taken(checkpoints):
    assert small_fit(checkpoints).resumed_from == 3


# Meshes, batches and shardings.


def test_batch_size_that_does_not_divide(tmp_path):
    with pytest.raises(ConfigError, match=r"scoring batch_size is 12; .*multiple of the 8 devices"):
        score(linear(), points(), tmp_path, loss_fn=classify, batch_size=12)
    with pytest.raises(ConfigError, match=r"probe batch_size is 12; .*multiple of the 8 devices"):
        fit(
            linear(),
            points(),
            tmp_path,
            stage=StageConfig(batch_size=12),
            loss_fn=classify,
            name="probe",
        )


def test_batch_that_does_not_divide_into_micro_batches():
    config = StageConfig(batch_size=8, micro_batches=3)
    with pytest.raises(ConfigError, match=r"probe\.micro_batches is 3; .*divisor of batch_size"):
        config.validate("probe")


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (4, 1, 1), (4, 4, 1), (16, 1, 1)])
def test_mesh_that_does_not_fit(sizes):
    assert jax.device_count() == 8
    with pytest.raises(ConfigError, match="do not multiply to the 8 devices"):
        sharding.make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), r"mesh\.data is 0; it must be -1 or positive"),
        ((1, -2, 1), r"mesh\.fsdp is -2; it must be -1 or positive"),
        ((-1, -1, 1), "at most one axis of size -1"),
    ],
)
def test_impossible_mesh(sizes, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(MeshConfig(*sizes))


def with_axes(shape, axes):
    return {"layer": {"kernel": nnx.Param(jnp.zeros(shape), logical_axes=axes)}}


def test_unknown_logical_axis():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match=r"kernel.*no sharding rule for .*\['featurs'\]"):
        sharding.shard_tree(with_axes((8, 4), ("featurs", "classes")), mesh)


def test_dimension_that_does_not_divide():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    tree = with_axes((6, 4), ("features", "classes"))
    with pytest.raises(
        ValueError, match=r"kernel.*'features' of size 6 .*4 devices .*'fsdp', 'tensor'"
    ):
        sharding.shard_tree(tree, mesh)


def test_filter_that_selects_no_parameter():
    with pytest.raises(ValueError, match="selects no parameter to train"):
        step.init_train_state(linear(), optax.sgd(0.1), trainable=nnx.BatchStat)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        step.make_train_step(nnx.graphdef(linear()), classify, optax.sgd(0.1), reduction="mean")


def test_method_with_a_weighted_head_but_no_weights(config):
    bad = dataclasses.replace(config.methods[0], head_stage="weighted")
    config = replace(config, methods=(bad, *config.methods[1:]))
    with pytest.raises(ConfigError, match=r"methods\[standard\]\.weighting is 'none'"):
        config.validate()
