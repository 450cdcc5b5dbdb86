"""One run in 1, 2 and 4 real processes: the same loss table, temperature, parameters, results.

And what two processes do that have not found the same.
"""

import json
import re

import numpy as np
import pytest
import tiny_language
from processes import Processes, has_ipv6, run
from safetensors.numpy import load_file

from easy_jax import pipeline as train
from easy_jax.config import MeshConfig, replace
from easy_jax.train.loss_table import LossTable

pytestmark = pytest.mark.slow

COUNTS = (1, 2, 4)
STEPS = 20
RATE = 0.003
# With `tensor` over two processes of four, two of them read the same rows.
MESH = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = [*tiny_language.WORDS, "now", "then"]  # and three special tokens: 16
    return tiny_language.write_folder(
        tmp_path_factory.mktemp("model"), train=8 * STEPS, heads=4, kv_heads=4, words=words
    )


@pytest.fixture(scope="module")
def runs(root, folder, tmp_path_factory):
    """By number of processes: workdir and what was printed.

    Two of them are late to see what the other has written."""
    runs = {}
    for count in COUNTS:
        workdir = tmp_path_factory.mktemp(f"run{count}")
        options = {"program": [root / "tests" / "nfs_lag.py"]} if count == 2 else {}
        runs[count] = workdir, run(root, _arguments("run", folder, workdir), count, **options)
    return runs


def _arguments(command, folder, workdir):
    return [
        command,
        f"--config=tests/tiny_language.py:{folder}",
        f"--workdir={workdir}",
        *MESH,
        f"--config.finetune.optimizer.learning_rate={RATE}",
    ]


def _parameters(workdir):
    return load_file(workdir / "exported" / "flow" / "model.safetensors")


@pytest.mark.parametrize("count", COUNTS[1:])
def test_same_loss_table_and_temperature(runs, count):
    alone, ours = (LossTable.open(runs[n][0] / "loss_table") for n in (1, count))
    ids = np.concatenate([ids for ids, _, _ in ours.rows()])
    assert sorted(ids) == list(range(8 * STEPS))
    np.testing.assert_allclose(ours.loss_N(), alone.loss_N(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours.temperature, alone.temperature, rtol=1e-6, atol=1e-6)
    assert ours.temperature == np.median(ours.loss_N())
    writers = {path.name.split("-")[1] for path in ours.directory.glob("part-*.parquet")}
    assert len(writers) == 2  # of four processes, two hold copies


@pytest.mark.parametrize("count", COUNTS[1:])
def test_same_parameters(runs, root, folder, count):
    """Their checkpoints are read, and exported, by two processes and by one."""
    run(root, _arguments("export", folder, runs[count][0]), 2)
    if not (runs[1][0] / "exported").exists():
        config = tiny_language.get_config(str(folder))
        config = replace(
            config,
            {"finetune.optimizer.learning_rate": RATE},
            mesh=MeshConfig(data=1, fsdp=2, tensor=4),
        )
        train.run(config, runs[1][0], "export")
    alone, ours = (_parameters(runs[n][0]) for n in (1, count))
    start = load_file(folder / "model.safetensors")
    assert alone.keys() == ours.keys() == start.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)
    assert max(np.abs(alone[name] - start[name]).max() for name in alone) > 0.01


@pytest.mark.parametrize("count", COUNTS[1:])
def test_same_results_written_once(runs, count):
    (alone, _), (ours, printed) = runs[1], runs[count]
    ours_rows, alone_rows = (
        json.loads((path / "results.json").read_text())["language"] for path in (ours, alone)
    )
    for row, expected in zip(ours_rows, alone_rows, strict=True):
        assert row["inputs"].keys() == expected["inputs"].keys()
        for name in expected["inputs"].keys() - {"loss table"}:  # there rounding differs
            assert row["inputs"][name] == expected["inputs"][name], name
        for key in expected.keys() - {"method", "seconds", "inputs"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
    assert len((ours / "cells.jsonl").read_text().splitlines()) == 2
    lines = [json.loads(line) for line in (ours / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    assert ["loss table:" in text for text in printed] == [True] + [False] * (count - 1)


@pytest.fixture(scope="module")
def checks(root, tmp_path_factory):
    """Exit codes, complaints and what came out (`tests/two_processes.py`), of each of two
    processes; the second has another copy of the training data.

    Over IPv6, where the machine has it."""
    folders = [tmp_path_factory.mktemp(f"host{host}") for host in range(2)]
    for folder in folders:
        (folder / "model").mkdir()
        tiny_language.write_folder(folder / "model")
    data = folders[1] / "model" / "train.jsonl"
    data.write_text(data.read_text().replace("one", "two", 1))
    config = f"--config={root}/tests/tiny_language.py:model"
    workdir = tmp_path_factory.mktemp("shared") / "run"
    program = [root / "tests" / "two_processes.py"]
    with Processes(
        root,
        ["score", config, f"--workdir={workdir}"],
        2,
        program=program,
        folders=folders,
        host="[::1]" if has_ipv6() else "127.0.0.1",
    ) as processes:
        codes, _, complaints = processes.wait()
    found = [folder / "results.json" for folder in folders]
    assert all(path.exists() for path in found), complaints
    return codes, complaints, [json.loads(path.read_text()) for path in found]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "other_data",
            "DisagreementError: the processes disagree at the start of scoring: data is "
            '"[0-9a-f]+" in process 0 and "[0-9a-f]+" in process 1. All processes need',
        ),
        (
            "other_rows",
            "DisagreementError: the processes disagree at reading the loss table: rows is "
            '"64 of 64, [0-9a-f]+" in process 0 and "32 of 64, [0-9a-f]+" in process 1. All',
        ),
        (
            "other_checkpoint",
            "DisagreementError: the processes disagree at the start of fit: checkpoint is 8 in "
            "process 0 and null in process 1. All processes need",
        ),
        (
            "other_workdir",
            "ConfigError: process 1 cannot see what process 0 writes into the workdir .*workdir; "
            "it must be a folder that all share",
        ),
    ],
)
def test_a_difference_is_told_by_all(checks, what, message):
    for results in checks[2]:
        assert re.match(message, results[what]), results[what]


def test_a_checkpoint_that_one_process_cannot_read_is_used_by_none(checks):
    (first, told, names), (second, untold, _) = (each["one_cannot_read"] for each in checks[2])
    assert (first, second) == (4, 4)
    assert len(told) == 1
    assert "8 is damaged (unread); it is now called damaged-8, and training continues" in told[0]
    assert untold == []
    assert {"4", "8", "damaged-8"} <= {*names}


def test_other_data_on_one_host(checks):
    codes, complaints, _ = checks
    assert codes == [2, 2], complaints
    for complaint in complaints:
        assert "easy-jax: the processes disagree at the start of scoring: data is " in complaint


def test_the_metadata_are_there_before_the_first_part(checks):
    for results in checks[2]:
        assert len(results["parts_after_metadata"]) == 4
        assert all(results["parts_after_metadata"])


def test_one_port_is_enough_and_compilations_are_noticed(checks):
    for results in checks[2]:
        assert results["port"] is True
        assert results["unidentified_connections"] == [0, 1]
        assert results["compilation"][0] is True
        assert results["compilation"][-1] is False
