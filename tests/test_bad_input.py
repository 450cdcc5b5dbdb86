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
import pytest
from flax import nnx
from points import classify, linear, points

from configs import quickstart
from easy_jax import pipeline as train
from easy_jax.config import (
    ConfigError,
    MeshConfig,
    MethodConfig,
    OptimizerConfig,
    StageConfig,
    replace,
)
from easy_jax.core import step
from easy_jax.parallel import sharding
from easy_jax.train.checkpoint import CheckpointError
from easy_jax.train.fitting import fit
from easy_jax.train.scoring import score

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


@pytest.mark.slow
def test_unknown_field_on_the_command_line(command_lines):
    code, out, err = command_lines["field"]
    assert code == 2
    (line,) = err.strip().splitlines()
    assert re.search(r"\blr\b", line) and "OptimizerConfig" in line
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_unknown_argument_on_the_command_line(command_lines):
    code, _, err = command_lines["argument"]
    assert code != 0
    assert re.search(r"quickstart\.py:nope is unknown; use .*noisy.*tiny", err)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(ConfigError, match="do not multiply to the 8 available devices"):
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


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("images", {"weighting": "flwo"}, r"\.weighting is 'flwo'; did you mean 'flow'\?"),
        ("images", {"weighting": "flow_token"}, r"\.weighting is 'flow_token'.*no tokens"),
        (
            "images",
            {"weighting": "power", "weighting_options": {"exponnt": 2.0}},
            r"\.weighting_options: weighting 'power' has no option 'exponnt'.*'exponent'",
        ),
        (
            "language",
            {"weighting": "power", "weighting_options": {"exponent": [0.5]}},
            r"\.weighting_options\[exponent\] is \[0.5\]; .*a number or a plain word",
        ),
        (
            "images",
            {"weighting": "psft", "weighting_options": {"refresh_steps": 0}},
            r"\.weighting_options: the option refresh_steps is 0; .* whole number of at least 1",
        ),
        ("images", {"anchor": "l3_sp"}, r"\.anchor is 'l3_sp'; did you mean 'l2_sp'\?|l1_sp"),
        ("images", {"averaging": "wiseft"}, r"\.averaging is 'wiseft'; did you mean 'wise_ft'\?"),
        ("images", {"trainable": "lora"}, r"\.trainable is 'lora'.*bn_head"),
        ("images", {"anchor_strength": 0.1}, r"\.anchor_strength is 0.1; it must be 0"),
        ("language", {"weighting": "flow_online"}, r"\.weighting is 'flow_online'.*loss table"),
        ("language", {"head_stage": "unweighted"}, r"\.head_stage is 'unweighted'.*'none'"),
        ("language", {"learning_rates": (0.1,)}, r"\.learning_rates is \(0.1,\)"),
        ("language", {"trainable": "bn_head"}, r"\.trainable is 'bn_head'.*lora"),
    ],
)
def test_a_method_that_cannot_be(kind, changes, message):
    with pytest.raises(ConfigError, match=rf"^config\.methods\[m\]{message}"):
        MethodConfig("m", **changes).validate("config.methods[m]", kind)


def test_a_former_name_of_an_anchor():
    with pytest.warns(DeprecationWarning, match="anchor 'l2' is now 'l2_sp'"):
        method = MethodConfig("m", anchor="l2", anchor_strength=0.1)
    assert method == MethodConfig("m", anchor="l2_sp", anchor_strength=0.1)


def test_a_workdir_of_the_version_before(tmp_path):
    """Its configuration has no new fields, and former names of anchors."""
    config = quickstart.get_config("tiny")
    train.open_workdir(config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["checksum"], stored["keep_best"]
    for method in stored["methods"]:
        del method["head_learning_rate"]
        method["anchor"] = {"l2_sp": "l2"}.get(method["anchor"], method["anchor"])
    assert "l2" in [method["anchor"] for method in stored["methods"]]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    train.open_workdir(config, tmp_path)
    del stored["seeds"]
    stored["methods"][0]["alpha"] = 0.25
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"methods\[0\]\.alpha: 0.5 now, 0.25 there"):
        train.open_workdir(config, tmp_path)
