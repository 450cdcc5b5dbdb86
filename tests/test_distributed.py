"""Which processes make a run: from flags, the environment, a cluster; and one alone."""

import os
import signal

import jax
import pytest

from easy_jax.config import ConfigError
from easy_jax.parallel import processes


class FoundError(Exception):
    """Raised in place of joining, with what was found."""


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(
            ("SLURM_", "JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS_ID", "OMPI_")
        ):
            monkeypatch.delenv(name)

    def join(address, count, index, *, run, **_):
        raise FoundError(address, count, index, run)

    monkeypatch.setattr(processes, "Peers", join)


def found(*args, **kwargs):
    with pytest.raises(FoundError) as info:
        processes.initialize(*args, **kwargs)
    return info.value.args[:3]


def test_one_process_alone_is_no_cluster(monkeypatch):
    processes.initialize()
    processes.initialize("host:1", 1, 0)
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "n1", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    processes.initialize()
    assert not jax.distributed.is_initialized()


def test_from_arguments_and_the_environment(monkeypatch):
    assert found("host:1", 4, 3) == ("host:1", 4, 3)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    monkeypatch.setenv("JAX_PROCESS_ID", "5")
    assert found() == ("other:2", 8, 5)
    assert found(process_id=0) == ("other:2", 8, 0)


def test_from_slurm(monkeypatch):
    slurm = {
        "JOB_ID": "70",
        "STEP_NODELIST": "node[03-04]",
        "NTASKS": "16",
        "PROCID": "9",
        "LOCALID": "1",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, count, index = found()
    assert (address.split(":")[0], count, index) == ("node03", 16, 9)


@pytest.mark.parametrize("given", [["--process_id=1"], ["--process_id", "1"], ["-process_id=1"]])
def test_the_process_id_is_no_part_of_the_run(monkeypatch, given):
    monkeypatch.setattr("sys.argv", ["easy-jax", "run", *given, "--workdir=w"])
    with pytest.raises(FoundError) as info:
        processes.initialize("host:1", 2, 1)
    assert info.value.args[3][1:] == ["run", "--workdir=w"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("host:1",), "num_processes, process_id not given, and no cluster"),
        (("host:1", 2), "process_id not given"),
        ((None, 2, 0), "coordinator_address not given"),
        (("host:1", 2, 2), "process_id is 2; it must be from 0 to num_processes - 1"),
    ],
)
def test_what_is_missing_or_wrong(args, message):
    with pytest.raises(ConfigError, match=message):
        processes.initialize(*args)


def test_bad_numbers(monkeypatch):
    for seconds in (0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"peer_timeout is {seconds}"):
            processes.initialize(timeout=seconds)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES is 'two'; it must be a number"):
        processes.initialize()


def test_alone_nothing_is_exchanged():
    assert processes.is_main_process()
    assert processes.gather("rows", {"a": [1]}) == [{"a": [1]}]


def test_sigterm_asks_to_stop(monkeypatch):
    monkeypatch.setattr(processes, "_asked_to_stop", False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        processes.stop_on_sigterm()
        assert not processes.should_stop("step 1")
        os.kill(os.getpid(), signal.SIGTERM)
        assert processes.should_stop("step 2")
    finally:
        signal.signal(signal.SIGTERM, before)
