"""A new metric is one function: measured on both tasks, in the results and in the tables."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import devices_mesh, small_glyphs

import easy_jax as ej
from easy_jax import pipeline
from easy_jax.config import (
    ConfigError,
    ExperimentConfig,
    MethodConfig,
    ResNetConfig,
    StageConfig,
)
from easy_jax.core.losses import ContractError
from easy_jax.report import images as report
from easy_jax.train import evaluate
from easy_jax.train.metrics import METRICS, Metric


def top_accuracy(number):
    def per_example(logits_BK, label_B):
        _, top = jax.lax.top_k(logits_BK, min(number, logits_BK.shape[1]))
        return 100.0 * jnp.any(top == label_B[:, None], axis=1)

    return Metric(f"top-{number} accuracy (%)", per_example)


@pytest.fixture(autouse=True)
def top5(monkeypatch):
    monkeypatch.setitem(METRICS._entries, "top5_accuracy", top_accuracy(5))


class Linear(nnx.Linear):
    """A classifier of vectors that are called images."""

    def __call__(self, image, mask=None):
        return super().__call__(image)


def _points(size=45, classes=9):
    rng = np.random.default_rng(0)
    fields = {"image": rng.normal(size=(size, 6)), "label": rng.integers(0, classes, size)}
    return ej.ArraySource({**fields, "image": fields["image"].astype(np.float32)}, classes)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "batch_size"), [(1, 7), (8, 16)])
def test_it_is_the_mean_over_all_examples(devices, batch_size):
    model, source = Linear(6, 9, rngs=nnx.Rngs(0)), _points()
    logits = np.float64(source.fields["image"]) @ np.float64(model.kernel[...])
    label = source.fields["label"]
    better = (logits > logits[np.arange(45), label][:, None]).sum(axis=1)
    found = evaluate.classification(
        model,
        source,
        batch_size=batch_size,
        mesh=devices_mesh(devices),
        group_N=np.arange(45) % 2,
        metrics=("top5_accuracy",),
    )
    np.testing.assert_allclose(found["top5_accuracy"], 100 * np.mean(better < 5), rtol=1e-9)
    np.testing.assert_allclose(found["accuracy"], 100 * np.mean(better < 1), rtol=1e-9)
    groups = [100 * np.mean(better[start::2] < 1) for start in (0, 1)]
    np.testing.assert_allclose(found["group_accuracy"], groups, rtol=1e-9)
    assert found["count"] == 45 and list(found)[:3] == ["accuracy", "loss", "top5_accuracy"]


def test_two_evaluations_share_a_compilation(monkeypatch):
    model, source = Linear(6, 9, rngs=nnx.Rngs(0)), _points()
    calls = []

    def counted(logits_BK, label_B):
        calls.append(logits_BK)
        return jnp.zeros(label_B.shape)

    monkeypatch.setitem(METRICS._entries, "zero", Metric("zero", counted))
    for _ in range(2):
        evaluate.classification(
            model, source, batch_size=8, mesh=devices_mesh(1), metrics=("zero",)
        )
    assert len(calls) == 1
    chex.assert_shape(calls[0], (8, 9))


def test_a_mean_over_the_batch_is_refused(monkeypatch):
    metric = Metric("mean", lambda logits_BK, label_B: jnp.mean(logits_BK))
    monkeypatch.setitem(METRICS._entries, "mean", metric)
    model = Linear(6, 9, rngs=nnx.Rngs(0))
    with pytest.raises(ContractError, match=r"'mean' returned an array of shape \(\).*\(8,\)"):
        evaluate.classification(model, _points(), batch_size=8, metrics=("mean",))


def _config(**changes):
    stage = StageConfig(epochs=1, batch_size=32)
    return ExperimentConfig(
        model=ResNetConfig(width=4, depths=(1,)),
        data=small_glyphs(label_noise=(0.0,)),
        methods=(MethodConfig("standard"),),
        **dict.fromkeys(("pretrain", "probe", "finetune", "head"), stage),
        **changes,
    )


@pytest.mark.slow
def test_an_experiment_measures_it_on_both_tasks(tmp_path):
    config = _config(metrics=("top5_accuracy", "loss"))
    results = pipeline.run(config, tmp_path, "evaluate")
    (row,) = results["results"]
    assert row["metrics"].keys() == {"top5_accuracy", "loss"}
    top5 = row["metrics"]["top5_accuracy"]
    assert row["pretrain_after"] <= top5["pretrain_after"] <= 100
    assert row["target"] <= top5["target"] <= 100
    text = report.markdown(config, results)
    assert "| retained top-5 accuracy (%) | target top-5 accuracy (%) |" in text
    loss = row["metrics"]["loss"]
    assert text.splitlines()[4].endswith(
        f"| {top5['pretrain_after']:.1f} | {top5['target']:.1f} | "
        f"{loss['pretrain_after']:.1f} | {loss['target']:.1f} |"
    )


def test_the_least_cross_entropy_is_bold(tmp_path):
    row = {
        "seed": 0,
        "label_noise": 0.0,
        "learning_rate": 0.1,
        "pretrain_before": 99.0,
        "pretrain_after": 50.0,
        "target": 50.0,
        "mean": 50.0,
        "target_by_decile": [50.0, 50.0],
    }
    losses = {"low": 1.0, "high": 2.0}
    rows = [
        {**row, "method": name, "metrics": {"loss": {"pretrain_after": x, "target": 3 - x}}}
        for name, x in losses.items()
    ]
    results = {"results": rows, "grid": [], "alpha_curves": [], "tasks": ["letters", "digits"]}
    (table, *_) = report.results_lib.chosen_tables(results)
    assert table.best == (2, 4, 5) and table.least == (6, 7)
    html = report._html_table(table)
    assert html.count("<b>1.0</b>") == 2 and "<b>2.0</b>" not in html


def test_unknown_metrics_suggest_the_nearest():
    with pytest.raises(ConfigError, match=r"config\.metrics is 'acuracy'; did you mean 'accuracy'"):
        _config(metrics=("acuracy",)).validate()
    with pytest.raises(ConfigError, match=r"config\.metrics .*distinct"):
        _config(metrics=("loss", "loss")).validate()
