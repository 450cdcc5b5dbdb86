"""Rules written outside the package, in a configuration's own file, in `easy-jax run`."""

import json

import pytest
import tiny_language
from forks import Forked

from easy_jax.io import sealed

pytestmark = pytest.mark.slow

LANGUAGE = """
import dataclasses

import jax.numpy as jnp
import tiny_language

import easy_jax as ej
from easy_jax.config import LanguageConfig, MethodConfig


@ej.weightings.register("confident")
def confident(stats):
    \"\"\"The probability of the target, and nothing where the model is undecided.\"\"\"
    return jnp.where(stats.entropy < 0.7, jnp.exp(-stats.nll), 0.0)


METHODS = (
    MethodConfig("standard"),
    MethodConfig("confident", weighting="confident"),
    MethodConfig("asft", weighting="dft", anchor="kl", anchor_strength=0.1),
    MethodConfig("lora_kl", trainable="lora", anchor="kl", anchor_strength=0.1),
    MethodConfig("lines", averaging="lines", alpha=0.3),
    MethodConfig("ema", averaging="ema", alpha=0.9),
)


def get_config(folder: str) -> LanguageConfig:
    config = tiny_language.get_config(folder)
    model = dataclasses.replace(config.model, lora_rank=2)
    return dataclasses.replace(config, model=model, methods=METHODS)
"""

IMAGES = """
import dataclasses

import jax.numpy as jnp

import easy_jax as ej
from configs import quickstart
from easy_jax.config import ExperimentConfig, MethodConfig


@ej.weightings.register
def trusted(stats):
    \"\"\"More for labels that the probed model expected and the current one does not.\"\"\"
    return jnp.exp(-stats.frozen_nll) * (1.0 - jnp.exp(-stats.nll))


def get_config() -> ExperimentConfig:
    methods = (
        MethodConfig("standard", start="probe"),
        MethodConfig("trusted", start="probe", weighting="trusted"),
    )
    return dataclasses.replace(quickstart.get_config("tiny"), methods=methods)
"""


def _run(root, arguments):
    process = Forked(["run", *arguments], root)
    out, err = process.communicate()
    return process.returncode, out, err


def test_language(root, tmp_path):
    """An own rule, ASFT, the divergence with adapters, LiNeS and EMA; run again, all is done."""
    folder = tmp_path / "data"
    folder.mkdir()
    tiny_language.write_folder(folder)
    (tmp_path / "own.py").write_text(LANGUAGE)
    arguments = [f"--config={tmp_path / 'own.py'}:{folder}", f"--workdir={tmp_path / 'run'}"]
    code, _, err = _run(root, arguments)
    assert code == 0, err
    results = sealed.read(tmp_path / "run" / "results.json", AssertionError, "")
    losses = {row["method"]: row["heldout_nll"] for row in results["language"]}
    assert list(losses) == ["base", "standard", "confident", "asft", "lora_kl", "lines", "ema"]
    assert len(set(losses.values())) == 7
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = {}
    for line in map(json.loads, lines):
        logged.setdefault(line["stage"], {}).update(line)
    confident, asft, lora = (logged[name] for name in _stages(logged))
    assert 0 < confident["weight_zero"] < 1 and "kl" not in confident
    assert asft["kl"] > 0 and 0 < asft["weight_mean"] < 1
    assert lora["kl"] > 0 and "weight_mean" not in lora
    code, out, err = _run(root, arguments)
    assert code == 0 and "done" in out, err


def _stages(logged):
    return [next(name for name in logged if key in name) for key in ("confident", "dft", "lora")]


def test_images(root, tmp_path):
    (tmp_path / "own.py").write_text(IMAGES)
    arguments = [f"--config={tmp_path / 'own.py'}", f"--workdir={tmp_path / 'run'}"]
    code, _, err = _run(root, arguments)
    assert code == 0, err
    results = sealed.read(tmp_path / "run" / "results.json", AssertionError, "")
    rows = {row["method"]: row["target"] for row in results["results"]}
    assert set(rows) == {"standard", "trusted"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    weights = [e["weight_mean"] for e in map(json.loads, lines) if "weight_mean" in e]
    assert weights and all(0 < weight < 1 for weight in weights)
