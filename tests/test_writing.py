"""What cannot be written is told in one line; what was complete is kept, and the same continues."""

import contextlib
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_language
from flax import nnx

from easy_jax import pipeline as train
from easy_jax.config import ConfigError, MethodConfig, StageConfig, replace
from easy_jax.core.losses import squared_error
from easy_jax.data import ArraySource
from easy_jax.io import files, metrics_log
from easy_jax.io.files import WriteError
from easy_jax.train.fitting import fit
from easy_jax.train.loss_table import LossTable
from easy_jax.train.scoring import score


def _regress(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


SOURCE = ArraySource({"x": np.ones((20, 1), "f"), "y": np.arange(20, dtype="f")[:, None]})


def _score(directory):
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    options = {"loss_fn": _regress, "batch_size": 8, "rows_per_part": 8}
    return score(model, SOURCE, directory, **options)


@pytest.fixture
def fill(monkeypatch):
    """Makes the disk full for files of a name, and not full."""
    write, full = Path.write_bytes, set()

    def written(path, content):
        if path.name.removesuffix(".tmp") in full:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", written)
    return full


@pytest.mark.parametrize("name", ["metadata.json", "part-00000-00001.parquet"])
def test_a_full_disk_while_scoring(name, fill, tmp_path):
    whole = _score(tmp_path / "whole")
    fill.add(name)
    with pytest.raises(WriteError) as told:
        _score(tmp_path / "run")
    assert str(told.value) == (
        f"{tmp_path / 'run' / name} cannot be written: No space left on device. What was complete "
        "before is kept; make room (or fix what is named) and run the same command again"
    )
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert sorted(kept) == (["metadata.json", "part-00000-00000.parquet"] if "part" in name else [])
    fill.clear()
    table = _score(tmp_path / "run")
    assert table.metadata == whole.metadata and LossTable.open(tmp_path / "run")
    for part in (name for name in kept if name.startswith("part-")):
        assert (tmp_path / "run" / part).read_bytes() == kept[part]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.json", "results.md", "report.html"])
def test_a_full_disk_while_reporting(name, fill, tmp_path):
    config = tiny_language.get_config(str(tiny_language.write_folder(tmp_path)))
    config = replace(config, methods=(MethodConfig("standard"),))
    fill.add(name)
    with pytest.raises(WriteError, match=rf"{name} cannot be written: No space left on device"):
        train.run(config, tmp_path / "run")
    fill.clear()
    assert not (tmp_path / "run" / name).exists()
    results = train.run(config, tmp_path / "run")
    assert (tmp_path / "run" / name).exists() and len(results["language"]) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written(name, tmp_path):
    if name == "metrics.jsonl":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("a file")
    with (
        pytest.raises(WriteError, match=rf"{name} cannot be written: (Is|Not) a directory"),
        contextlib.closing(metrics_log.MetricsLog(tmp_path)) as log,
    ):
        log.write("fit", "train", 1, {"loss": 1.0})


def test_the_log_on_a_disk_that_is_really_full(tmp_path):
    lines = files.Lines(tmp_path / "metrics.jsonl")
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), lines._local.fileno())
    lines.append("{}")
    with pytest.raises(WriteError, match=r"metrics\.jsonl cannot be written: No space left on dev"):
        lines.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss_table", "loss_table/metadata.json", "cells.jsonl"])
def test_a_file_where_a_folder_belongs_or_the_reverse(name, tmp_path):
    config = tiny_language.get_config(str(tiny_language.write_folder(tmp_path)))
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch() if name == "loss_table" else path.mkdir()
    with pytest.raises((ValueError, OSError), match=rf"{name} cannot be (read|written): ") as told:
        train.run(config, tmp_path / "run")
    assert "\n" not in str(told.value)


# Paths that Orbax would read as patterns.

BROKEN = ["run[1]", "[1]", "a*b", "a?b", "a\\b", "x[/red]y", "a\udcffb", "gs:"]


def _fit(directory):
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    return fit(model, SOURCE, directory, stage=StageConfig(batch_size=8), loss_fn=_regress)


@pytest.mark.parametrize("name", BROKEN, ids=ascii)
def test_a_path_that_cannot_be_read_back_is_refused_at_once(name, tmp_path):
    config = tiny_language.get_config("nowhere")
    message = r"in its path, with which checkpoints cannot be read back; use another"
    for begin in (lambda folder: train.open_workdir(config, folder), _fit):
        with pytest.raises(ConfigError, match=message):
            begin(tmp_path / name / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_one_is_in_counts(tmp_path, monkeypatch):
    (tmp_path / "project[1]").mkdir()
    monkeypatch.chdir(tmp_path / "project[1]")
    with pytest.raises(ConfigError, match=r"project\[1\]/runs has '\[' in its path"):
        _fit("runs")


@pytest.mark.parametrize("name", ["a b", "a{b}", "é", "~a", "$HOME", "a:b", "a%41", "a#b", "-a"])
def test_other_paths_work(name, tmp_path):
    files.check_folder(tmp_path / name)


def test_a_loss_table_needs_no_such_path(tmp_path):
    table = _score(tmp_path / "run[1]")
    assert LossTable.open(tmp_path / "run[1]").metadata == table.metadata
    with pytest.raises(ConfigError, match=r"gs://bucket/run\[1\] has '\['"):
        files.check_folder(files.epath.Path("gs://bucket/run[1]"))
