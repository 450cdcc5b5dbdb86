"""Starts the command line as real processes that share eight fake devices over loopback."""

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys

from forks import Forked

DEVICES = 8
# Programs are small here: compiling them takes most of the time, and this a third of it.
CHEAP_COMPILATION = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA of later ones ends the process
    CHEAP_COMPILATION += " --xla_cpu_use_fusion_emitters=false"


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


def _start(prefix, command, folder, environment):
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "easy_jax.main", *command],
        cwd=folder,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


class Processes:
    """The processes of one run, started together; killed at the end of a `with` block.

    Args:
      root: of the repository.
      arguments: of `easy-jax`.
      count: how many processes.
      devices: in all.
      timeout: their `--peer_timeout`, seconds.
      only: start these alone of them.
      prefix: of the command, for example of a shell; then Python starts anew.
      program: a file to run instead of `easy-jax`, and its first arguments.
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
        program=None,
        folders=None,
        host="127.0.0.1",
    ):
        environment = {
            "PYTHONPATH": str(root),
            "COLUMNS": "200",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"{CHEAP_COMPILATION} --xla_force_host_platform_device_count="
            f"{devices // count}",
        }
        cluster = []
        if count > 1:
            cluster = [
                f"--coordinator_address={host}:{free_port()}",
                f"--num_processes={count}",
                f"--peer_timeout={timeout}",
            ]
        self.all = []
        for index in range(count) if only is None else only:
            command = [*arguments, *cluster]
            if count > 1:
                command.append(f"--process_id={index}")
            folder = folders[index] if folders else root
            if prefix:
                started = _start(prefix, command, folder, environment)
            else:
                started = Forked(command, folder, environment, program)
            self.all.append(started)

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
