"""Starts the command line as real processes that share eight fake devices over loopback."""

import os
import signal
import socket
import subprocess
import sys

DEVICES = 8


def has_ipv6():
    """Whether the loopback has it."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """The processes of one run, started together; killed at the end of a `with` block.

    Args:
      root: of the repository.
      arguments: of `easy-jax`.
      count: how many processes.
      devices: in all.
      timeout: their `--peer_timeout`, seconds.
      only: start these alone of them.
      prefix: of the command, for example of a shell.
      program: what Python is to run.
      host: of the coordinator's address.
      folders: where each process is started; default: all in the root.
    """

    def __init__(
        self,
        root,
        arguments,
        count=1,
        devices=DEVICES,
        timeout=60,
        only=None,
        prefix=(),
        program=("-m", "easy_jax.main"),
        folders=None,
        host="127.0.0.1",
    ):
        env = {
            **os.environ,
            "PYTHONPATH": str(root),
            "COLUMNS": "200",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}",
        }
        cluster = []
        if count > 1:
            cluster = [
                f"--coordinator_address={host}:{free_port()}",
                f"--num_processes={count}",
                f"--peer_timeout={timeout}",
            ]
        self.all = [
            subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    *program,
                    *arguments,
                    *cluster,
                    *([f"--process_id={index}"] if count > 1 else []),
                ],
                cwd=folders[index] if folders else root,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for index in (range(count) if only is None else only)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def wait(self, timeout=300):
        """Exit codes, what was printed, and what was complained."""
        results = [process.communicate(timeout=timeout) for process in self.all]
        codes = [process.returncode for process in self.all]
        return codes, [out for out, _ in results], [err for _, err in results]

    def signal(self, index, number=signal.SIGKILL):
        self.all[index].send_signal(number)


def run(root, arguments, count=1, **options):
    """Runs to the end; all must succeed. Returns what each printed."""
    with Processes(root, arguments, count, **options) as processes:
        codes, outs, errs = processes.wait()
    assert codes == [0] * count, (codes, outs, errs)
    return outs
