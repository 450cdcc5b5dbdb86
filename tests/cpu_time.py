"""Measures the CPU time of each test, and names those that lack the mark `slow`.

CPU time, because a wall clock on a busy machine says little. It is told, never a failure.
"""

import os
import resource
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

LIMIT = 5.0  # seconds; the mark is for those that take more than about one
_TICKS = os.sysconf("SC_CLK_TCK")  # now, because tests replace os.sysconf
_KEY = pytest.StashKey[float]()


def used():
    """Seconds of CPU time so far: of this process, and of those it started that are over."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + _forked()


def _forked():
    """The same of the processes that are forked from one, which are its children, not ours."""
    server = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/stat")
    if not server.exists():
        return 0.0
    fields = server.read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / _TICKS


class CpuTime:
    """The plugin."""

    def __init__(self):
        self.unmarked = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        item.stash[_KEY] = used()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        report.user_properties.append(("cpu_seconds", used() - item.stash[_KEY]))
        return report

    def pytest_runtest_logreport(self, report):
        seconds = dict(report.user_properties).get("cpu_seconds", 0.0)
        if "slow" not in report.keywords and seconds > LIMIT:
            self.unmarked[report.nodeid] = seconds

    def pytest_terminal_summary(self, terminalreporter):
        if self.unmarked:
            terminalreporter.section(f"without the mark slow, yet over {LIMIT:g} s of CPU time")
            for test, seconds in sorted(self.unmarked.items(), key=lambda item: -item[1]):
                terminalreporter.line(f"{seconds:6.1f} s {test}")
