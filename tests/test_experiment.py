"""Whole experiments in miniature: every shipped config, shared stages, one compilation each."""

import json
import sys
from pathlib import Path

import pytest
from helpers import load_config, small_glyphs

from easy_jax import config
from easy_jax import pipeline as train
from easy_jax.config import ExperimentConfig, GlyphDataConfig, ResNetConfig, replace
from easy_jax.experiments import plan
from easy_jax.experiments import results as results_lib
from easy_jax.report import images as report

SMALL = {"epochs": 1, "batch_size": 32}


def _shrunken(config: ExperimentConfig, **changes) -> ExperimentConfig:
    """The same experiment on a few examples: one step per stage."""
    stages = ("pretrain", "probe", "finetune", "head")
    small = {f"{name}.{field}": n for name in stages for field, n in SMALL.items()}
    config = replace(
        config,
        {**small, "scoring.batch_size": 1024},
        model=ResNetConfig(width=4, depths=(1, 1)),
        data=small_glyphs(label_noise=config.data.label_noise[:1]),
        eval_batch_size=1024,
        seeds=config.seeds[:1],
        learning_rates=config.learning_rates[:1],
    )
    return replace(config, **changes)


def _arguments():
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py")):
        module = load_config(path)
        config = module.get_config()
        if not isinstance(config, ExperimentConfig):
            continue  # tests/test_language.py has these
        if not isinstance(config.data, GlyphDataConfig):
            continue  # tests/test_resnet_transfer.py has these
        for argument in module.ARGUMENTS:
            yield pytest.param(path, argument, id=f"{path.stem}:{argument}")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "argument"), list(_arguments()))
def test_every_config_is_valid_and_runs_one_shrunken_step(path, argument, tmp_path):
    module = load_config(path)
    config = module.get_config(argument)
    config.validate()
    assert f":{argument}" in module.__doc__ or argument == module.ARGUMENTS[0]
    only = tuple(m.name for m in config.methods if m.name in ("standard", "flow"))
    results = train.run(_shrunken(config, only=only), tmp_path / "run", "evaluate")
    assert [row["method"] for row in results["results"]] == list(only)
    for row in results["results"]:
        assert 0 <= row["pretrain_after"] <= 100 and 0 <= row["target"] <= 100


@pytest.mark.slow
def test_a_step_is_compiled_once_per_kind_of_stage(root, tmp_path, monkeypatch):
    module = sys.modules["easy_jax.train.fitting"]
    steps, make = [], module.make_train_step

    def recording(*args, **kwargs):
        steps.append(make(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(module, "make_train_step", recording)
    module._compiled.cache_clear()
    config = _shrunken(load_config(root / "configs" / "quickstart.py").get_config("full"))
    config = replace(config, learning_rates=(0.01, 0.1))
    results = train.run(config, tmp_path / "run", "report")
    module._compiled.cache_clear()
    # 13 methods at 2 learning rates: pre-training; all, head, BatchNorm + head; l2.
    assert sum(step._cache_size() for step in steps) == 5
    assert len(results["results"]) == 13 and len(results["grid"]) == 13

    names = [entry["stage"] for entry in _lines(tmp_path / "run" / "metrics.jsonl")]
    assert set(names) == {key.path for key in plan.plan(config)}
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<figure>") == 6 and "<script" not in page
    for method in config.methods:
        assert f"<td>{method.name}</td>" in page

    table_path = tmp_path / "run" / "loss_table" / "seed0-noise0.3" / "metadata.json"
    table = json.loads(table_path.read_text())
    assert table["complete"] and table["num_rows"] == 32


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _row(method, seed, rate, target, retained, **more):
    return {
        "method": method,
        "seed": seed,
        "label_noise": 0.0,
        "learning_rate": rate,
        "pretrain_before": 99.0,
        "pretrain_after": retained,
        "target": target,
        "mean": (retained + target) / 2,
        "seconds": 1.0,
        "target_validation": target,
        "pretrain_validation": retained,
        "target_by_decile": [target + 10, target - 10],
        **more,
    }


def _grid_config():
    methods = (config.MethodConfig("a"),)
    return ExperimentConfig(learning_rates=(0.001, 0.01, 0.1), methods=methods)


def test_selection_rules_use_validation_only():
    rows = [
        _row("a", 0, 0.1, target=90, retained=10),
        _row("a", 0, 0.01, target=80, retained=95),
        # The test accuracy must not matter:
        _row("a", 0, 0.001, target=99, retained=99, target_validation=1, pretrain_validation=1),
        _row("a", 1, 0.1, target=70, retained=50),
        _row("a", 1, 0.01, target=70, retained=50),
    ]
    results = results_lib.select(ExperimentConfig(), rows)
    assert [(r["seed"], r["learning_rate"]) for r in results["results"]] == [(0, 0.1), (1, 0.01)]
    assert [r["learning_rate"] for r in results["results_by_mean"]] == [0.01, 0.01]
    assert len(results["grid"]) == 3
    line = results_lib.summary(results["results"])[0.0][0]
    assert line == ("a", "0.01 – 0.1", "30.0 ± 28.3", "-69.0", "80.0 ± 14.1", "55.0 ± 7.1")
    text = report.markdown(_grid_config(), results)
    assert "| a | 0.01 – 0.1 | 30.0 ± 28.3 | -69.0 | 80.0 ± 14.1 | 55.0 ± 7.1 |" in text
    assert "| a | 90.0 | 70.0 |" in text  # deciles, of which the rows here have two
    assert "| a | 99.0 / 99.0 | 72.5 / 75.0 | 30.0 / 80.0 |" in text
    assert "Before fine-tuning, letters: 99.0 ± 0.0 %." in text


def test_methods_share_their_stages(root):
    config = load_config(root / "configs" / "quickstart.py").get_config("full")
    config.validate()
    stages = plan.plan(config)
    # 3 pre-trainings; per seed and setting a probe; per learning rate 9 fine-tunings, which
    # WiSE-FT and the last stages reuse, and 2 head stages. 13 methods would be 13 * 4 * 6.
    # At its own learning rate the probe is the linear probe that is compared with.
    assert len(stages) == 3 + 6 * (1 + 4 * (9 + 2) - 1)
    for stage in stages.values():
        assert stage.start is None or list(stages).index(stage.start) < list(stages).index(
            stage.key
        )
