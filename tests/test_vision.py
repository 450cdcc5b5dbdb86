"""Experiments with images beyond one run of them: what each stage may change, and comparisons."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from forks import Forked
from image_data import stage

from easy_jax import pipeline as train
from easy_jax.config import (
    ConfigError,
    ExperimentConfig,
    GlyphDataConfig,
    MethodConfig,
    ResNetConfig,
    TransferDataConfig,
    replace,
)
from easy_jax.experiments import results as results_lib
from easy_jax.experiments.plan import StageKey, plan, probe_key
from easy_jax.experiments.tasks import load_tasks
from easy_jax.models.modes import eval_mode
from easy_jax.report import images as report
from easy_jax.train import evaluate
from easy_jax.train.loss_table import LossTable


def letters(**changes) -> ExperimentConfig:
    """Letters, well enough learnt that forgetting shows, and digits."""
    config = ExperimentConfig(
        model=ResNetConfig(width=8, depths=(1, 1)),
        data=GlyphDataConfig(
            image_size=12,
            pretrain_train=2048,
            pretrain_validation=64,
            pretrain_test=512,
            target_train=256,
            target_validation=64,
        ),
        pretrain=stage(8),
        probe=stage(4, 0.02),
        finetune=stage(4),
        head=stage(),
        learning_rates=(0.02,),
        eval_every_epochs=100,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Methods that should change nothing, both sorts of weights, and a curve of WiSE-FT."""
    probed = {"start": "probe"}
    methods = (
        MethodConfig("probe", trainable="head"),
        MethodConfig("standing", **probed, learning_rates=(0.0,)),
        MethodConfig("tuned", **probed),
        MethodConfig("wise_ft", **probed, averaging="wise_ft", alpha=0.5),
        MethodConfig("wise_ft_0", **probed, averaging="wise_ft", alpha=0.0),
        MethodConfig("wise_ft_1", **probed, averaging="wise_ft", alpha=1.0),
        MethodConfig(
            "flow", **probed, weighting="flow", head_stage="unweighted", head_learning_rate=0.01
        ),
        MethodConfig("static", **probed, weighting="flow"),
        MethodConfig("online", **probed, weighting="flow_online"),
    )
    config = letters(methods=methods, frozen_batch_norm=("finetune", "head"))
    workdir = tmp_path_factory.mktemp("run")
    return config, workdir, train.run(config, workdir)


def row(results, method):
    (found,) = (row for row in results_lib.all_rows(results) if row["method"] == method)
    return found


@pytest.mark.slow
def test_probing_forgets_nothing_to_the_last_image(experiment):
    _, _, results = experiment
    probe = row(results, "probe")
    assert 30 < probe["pretrain_before"] < 100  # so that it could change
    assert probe["pretrain_after"] == probe["pretrain_before"]


@pytest.mark.slow
def test_a_learning_rate_of_zero_changes_neither_task(experiment):
    _, _, results = experiment
    standing, probe = row(results, "standing"), row(results, "probe")
    assert standing["pretrain_after"] == standing["pretrain_before"]
    assert standing["target"] == probe["target"]
    assert standing["target_by_decile"] == probe["target_by_decile"]
    tuned = row(results, "tuned")
    assert tuned["pretrain_after"] != tuned["pretrain_before"]
    assert tuned["target"] != probe["target"]


@pytest.mark.slow
def test_the_ends_of_an_alpha_curve_are_the_models_averaged(experiment):
    config, _, results = experiment
    (curve,) = results["alpha_curves"]
    assert curve["method"] == "wise_ft"
    first, middle, last = curve["points"]
    assert [point["alpha"] for point in curve["points"]] == [0.0, 0.5, 1.0]
    for point, method in ((first, "probe"), (middle, "wise_ft"), (last, "tuned")):
        for key in ("pretrain_after", "target", "mean"):
            assert point[key] == row(results, method)[key]
    shown = results_lib.without_variants(results, results["results"])
    variants = {"wise_ft_0", "wise_ft_1"}
    assert {row["method"] for row in shown} == {m.name for m in config.methods} - variants


@pytest.mark.slow
def test_deciles_are_of_the_probed_models_loss_on_test_data(experiment):
    config, workdir, results = experiment
    table = LossTable.open(workdir / "loss_table" / "seed0-noise0.3-test")
    tasks = load_tasks(config, 0, 0.3)
    size = len(tasks.target.test)
    assert table.num_examples == size
    group_N = evaluate.loss_groups(table.loss_N())
    sizes = np.bincount(group_N)
    assert sizes.sum() == size and sizes.max() - sizes.min() <= 1
    order = np.argsort(table.loss_N())
    assert (np.diff(group_N[order]) >= 0).all()
    runner = train.ImageExperiment(config, workdir, train.Terminal(quiet=True))
    runner.run("train")
    static = StageKey("probe-all-flow", 0, 0.3, 0.02)
    for method, key in (("probe", probe_key(0, 0.3)), ("static", static)):
        model = runner.networks.merge(runner.fit(key).model_state, 10)
        logits_NK = nnx.jit(eval_mode(model))(tasks.target.test.fields["image"])
        right_N = np.argmax(logits_NK, axis=1) == tasks.target.test.fields["label"]
        expected = [100 * np.mean(right_N[group_N == decile]) for decile in range(10)]
        np.testing.assert_allclose(row(results, method)["target_by_decile"], expected)
        assert expected[0] > expected[-1]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("7", "“7”  0.12"),
        ("dog", "“dog”  0.12"),
        ("beagle", "“beagle”\n0.12"),
        ("n02088364-beagle-of-ours", "“n02088364-be…”\n0.12"),
    ],
)
def test_pictures_carry_the_names_of_classes(name, title):
    assert report._picture_title(name, 0.1234) == title


@pytest.mark.slow
def test_every_analysis_is_in_the_report(experiment):
    _, workdir, _ = experiment
    page, text = ((workdir / name).read_text() for name in ("report.html", "results.md"))
    for where in (page, text):
        assert "by alpha, the share of the fine-tuned weights" in where
        assert "by decile of the probed model's loss" in where.replace("&#x27;", "'")
    assert "| wise_ft_0 |" not in text and "<td>wise_ft_0</td>" not in page
    assert page.count("<figure>") == 6


@pytest.mark.slow
def test_online_weights_are_the_tables_where_views_are_fixed(experiment):
    """Without random views, weights in the step and weights of the table train the same model."""
    config, workdir, results = experiment
    static, online, tuned = (row(results, name)["target"] for name in ("static", "online", "tuned"))
    assert static == online != tuned
    runner = train.ImageExperiment(config, workdir, train.Terminal(quiet=True))
    runner.run("train")
    static, online, tuned = (
        jax.tree.leaves(
            jax.device_get(runner.fit(StageKey(f"probe-all{kind}", 0, 0.3, 0.02)).model_state)
        )
        for kind in ("-flow", "-flow_online", "")
    )
    for ours, theirs in zip(online, static, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(static, tuned, strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_batch_norm": ("pretrain",)}, "frozen_batch_norm is 'pretrain'; it must be one"),
        ({"model": ResNetConfig(in_channels=3)}, "in_channels is 3; it must be 1, as the images"),
        ({"model": ResNetConfig(path="x")}, "model.path is 'x'; it must be empty"),
        ({"data": TransferDataConfig()}, r"in_channels is 1; it must be 3"),
        (
            {"methods": (MethodConfig(), MethodConfig("slow", learning_rates=(-1.0,)))},
            r"methods\[slow\].learning_rates is -1.0; it must be finite and at least 0",
        ),
        (
            {"methods": (MethodConfig(learning_rates=(0.1,)),)},
            r"config.learning_rates is \(0.02,\); it must be empty: every method has",
        ),
        ({"learning_rates": ()}, r"learning_rates is \(\); it must be not empty: standard have"),
        (
            {"methods": (MethodConfig(anchor="l2_sp"),)},
            r"methods\[standard\].anchor_strength is 0.0; it must be positive, because anchor is",
        ),
        (
            {"methods": (MethodConfig(anchor_strength=0.1),)},
            r"anchor_strength is 0.1; it must be 0, because anchor is 'none'",
        ),
        (
            {"methods": (MethodConfig(head_learning_rate=0.1),)},
            r"head_learning_rate is 0.1; it must be 0, because there is no head_stage",
        ),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    if "data" in changes:
        paths = {"pretrain.path": "data", "target.path": "data"}
        changes = {**changes, "data": replace(changes["data"], paths)}
    with pytest.raises(ConfigError, match=message):
        letters(**{"methods": (MethodConfig(),), **changes}).validate()


# The `easy-jax` command; it prints which runs it evaluates, and is killed after some of them.
PROGRAM = """
import os, signal, sys
from easy_jax.cli import main
from easy_jax.experiments.vision import ImageExperiment
from easy_jax.io import metrics_log

evaluate, append, left = ImageExperiment.evaluate, metrics_log.append_line, [int(sys.argv.pop(1))]

def announce(self, run):
    print("evaluates", run.method.name, flush=True)
    return evaluate(self, run)

def append_and_die(path, line):
    append(path, line)
    if path.name == "cells.jsonl":
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

ImageExperiment.evaluate, metrics_log.append_line = announce, append_and_die
main.cli()
"""


@pytest.mark.slow
def test_a_comparison_that_is_killed_repeats_no_run(root, tmp_path):
    names = ("standard", "l2", "wise_ft", "flow", "flow_wise_ft")

    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = [
        "compare",
        f"--config={root}/configs/quickstart.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        f"--config.only={','.join(names)}",
    ]

    def compare(runs_until_killed):
        program = [tmp_path / "program.py", runs_until_killed]
        process = Forked(arguments, root, program=program)
        out, err = process.communicate()
        lines = [line.split() for line in out.splitlines()]
        evaluated = [line[1] for line in lines if line[:1] == ["evaluates"]]
        return process.returncode, evaluated, err

    path = tmp_path / "run" / "cells.jsonl"
    code, evaluated, _ = compare(3)
    assert (code, evaluated) == (-signal.SIGKILL, ["standard", "l2", "wise_ft"])
    before = path.read_text()
    code, evaluated, error = compare(-1)
    assert (code, evaluated) == (0, ["flow", "flow_wise_ft"]), error
    assert path.read_text().startswith(before)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [found["method"] for found in results["results"]] == list(names)


def test_frozen_stages_as_the_command_line_gives_them():
    config = letters(methods=(MethodConfig(),), frozen_batch_norm=("probe,finetune",)).validate()
    frozen = {stage.key.path: stage.frozen_norm for stage in plan(config).values()}
    assert list(frozen.values()) == [False, True, True]
