"""Starts `easy-jax` in processes that are forked from one that has imported the library.

That spares most of a start, which takes longer than what these tests run. Each has its own number
and memory, and JAX starts anew in it. `tests/test_cli.py` starts Python itself.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["easy_jax.cli.main", "easy_jax.pipeline", "easy_jax.report.images", "sklearn.datasets"]
)


def _run(program, arguments, folder, out, err, environment):
    """In the forked process: a command line, with its output in files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [*map(str, program or ["easy-jax"]), *arguments]
    try:
        if program:
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(str(program[0]), run_name="__main__")
        else:
            from easy_jax.cli import main

            main.cli()
    finally:
        atexit._run_exitfuncs()  # which `multiprocessing` leaves out


class Forked:
    """A command line in a forked process; used like `subprocess.Popen`.

    Args:
      arguments: of the command.
      folder: where it runs.
      environment: variables to set besides those of this process. JAX has read its own before:
        for them, those count that this process had when it forked the first.
      program: a file to run instead of `easy-jax`, and its first arguments.
    """

    def __init__(self, arguments, folder, environment=None, program=None):
        environment = {**os.environ, **(environment or {})}
        self._paths = []
        for _ in ("out", "err"):
            handle, path = tempfile.mkstemp(prefix="printed-")
            os.close(handle)
            self._paths.append(Path(path))
        self._process = CONTEXT.Process(
            target=_run,
            args=(program, arguments, folder, *map(str, self._paths), environment),
            daemon=True,
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    @property
    def printed(self):
        """So far, to both."""
        return "".join(path.read_text() for path in self._paths)

    def communicate(self, timeout=300):
        """Waits for the end; returns what was printed and what was complained."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("easy-jax", timeout, self.printed[-500:])
        return tuple(path.read_text() for path in self._paths)

    def __del__(self):
        for path in self._paths:
            path.unlink(missing_ok=True)
