"""Rows of results: refused where what they depend on has changed, or they have."""

import dataclasses
import json

import pytest
import tiny_language
from safetensors.numpy import load_file, save_file
from test_damage import check_every_byte

from easy_jax import pipeline as train
from easy_jax.config import MethodConfig
from easy_jax.experiments.measurements import Measurements
from easy_jax.io.sealed import ArtefactError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder, workdir, configuration and results of a finished experiment."""
    folder = tiny_language.write_folder(tmp_path_factory.mktemp("model"))
    config = dataclasses.replace(
        tiny_language.get_config(str(folder)),
        general=(str(folder / "prose.txt"),),
        methods=(MethodConfig("standard"),),
    )
    workdir = tmp_path_factory.mktemp("run")
    return folder, workdir, config, train.run(config, workdir)


def _reversed_lines(path):
    path.write_text("\n".join(path.read_text().splitlines()[::-1]))


def _one_word_less(path):
    path.write_text(path.read_text().rpartition(" ")[0])


def _other_norm(path):
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, path)


def _other_theta(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 500.0}))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("heldout.jsonl", _reversed_lines, "heldout"),
        ("prose.txt", _one_word_less, "prose"),
        ("train.jsonl", _reversed_lines, "training data"),
        ("model.safetensors", _other_norm, "base weights"),
        ("config.json", _other_theta, "base model"),
    ],
)
def test_results_from_other_inputs_are_refused_and_named(done, file, change, named):
    folder, workdir, config, results = done
    content = (folder / file).read_bytes()
    before = (workdir / "cells.jsonl").read_bytes()
    try:
        change(folder / file)
        with pytest.raises(ArtefactError) as told:
            train.run(config, workdir, "evaluate")
    finally:
        (folder / file).write_bytes(content)
    text = str(told.value)
    assert "cells.jsonl has results, of base, from other inputs than there are now: " in text
    # That alone, with both fingerprints, and what to do.
    assert f"now: {named} is " in text and text.count(" there and ") == 1
    assert text.endswith("delete it, and what it has is measured again, from the checkpoints")
    assert (workdir / "cells.jsonl").read_bytes() == before
    assert train.run(config, workdir, "evaluate") == results


def test_what_is_deleted_is_measured_again_from_the_checkpoints(done):
    _, workdir, config, results = done
    path, log = workdir / "cells.jsonl", workdir / "metrics.jsonl"
    before, steps = path.read_text(), log.read_text()
    path.unlink()
    assert train.run(config, workdir, "evaluate") == results
    assert path.read_text() == before
    assert log.read_text() == steps  # nothing was trained


def test_every_byte_of_the_results(done):
    workdir = done[1]
    path = workdir / "cells.jsonl"
    inputs = json.loads(path.read_text().splitlines()[0])["inputs"]
    rows = Measurements(path, lambda: inputs).read()
    assert [row["method"] for row in rows] == ["base", "standard"]
    # The last line may look as if a kill had cut it short; it is measured again then.
    check_every_byte(
        path,
        lambda: Measurements(path, lambda: inputs).read(),
        lambda found: found in (rows, rows[:1]),
        ArtefactError,
    )


def test_results_without_checksums_are_of_an_older_version(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"method": "base", "heldout_nll": 1.0}\n')
    with pytest.raises(ArtefactError, match=r"cells.jsonl:1 has no checksum: it was changed, or"):
        Measurements(path, dict).read()


def test_two_texts_of_one_name_are_refused(done, tmp_path):
    folder, _, config, _ = done
    (tmp_path / "prose.txt").write_text((folder / "prose.txt").read_text())
    config = dataclasses.replace(config, general=(*config.general, str(tmp_path / "prose.txt")))
    with pytest.raises(ValueError, match="there is another text called prose"):
        train.run(config, tmp_path / "run", "evaluate")
