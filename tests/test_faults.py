"""A run that is killed, stopped, starved or loses a process, and the same command again.

The short form of `tests/faults/faults.py`.
"""

import signal

import pytest
from faults import PHASES, Faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("phase", PHASES)
def test_killed(faults, phase):
    faults.kill(phase)


@pytest.mark.parametrize("phase", ["scoring", "training"])
def test_stopped(faults, phase):
    faults.stop(phase)


def test_disk_full(faults):
    faults.fill_the_disk()


def test_one_of_four_killed(faults):
    faults.lose_one(3)


def test_from_eight_devices_to_four_to_one(faults):
    workdir = faults.workdir()
    for devices in (8, 4):
        faults.interrupt(workdir, "training", signal.SIGTERM, late=0.5, devices=devices)
    faults.again(workdir)
    faults.check_close(workdir)


def test_a_process_that_does_not_come(faults):
    with faults.start(faults.workdir(), 3, only=[0, 2], timeout=8) as run:
        codes, _, complaints = run.wait()
    assert codes == [76, 76]
    for complaint in complaints:
        assert "process 1 of 3 did not connect within 8 s; see their logs" in complaint
