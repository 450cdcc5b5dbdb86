"""Coordination of the processes of a run: start, exchange of values, and orderly stop."""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import clusters  # not public; `jax.distributed.initialize` uses it
from jax.experimental import multihost_utils

from easy_jax.io import fingerprint as fingerprints
from easy_jax.io.checks import ConfigError
from easy_jax.parallel.rendezvous import name_processes
from easy_jax.parallel.watch import Peers

_ECHO_SECONDS = 3.0
_COMPILATION = "/jax/core/compile/"  # prefix of JAX's events for tracing, lowering and XLA
EXIT_STOPPED = 75  # exit code after SIGTERM and saving; running again continues the run

_peers: Peers | None = None
_asked_to_stop = False
_calls = itertools.count()


class DisagreementError(ValueError):
    """A value that must be equal in all processes of a run differs; the message lists both."""


class Stopped(Exception):  # noqa: N818, no error
    """The run was asked to stop (SIGTERM) and has saved its state."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
) -> None:
    """Connects this process to the others of its run; call it before any other use of JAX.

    Missing arguments are taken from the environment variables `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or from the cluster: TPU slices (also on GKE), SLURM,
    Kubernetes or Open MPI. If there is no cluster, or only one process, the function does nothing.
    If a process is lost later, all processes of the run end.

    The processes prove to each other that they belong to the same run. They do so by the token in
    the environment variable `EASY_JAX_RUN_TOKEN` or, without one, by their version and command
    line.

    Args:
      coordinator_address: `HOST:PORT` of process 0, or `[HOST]:PORT` for an IPv6 address. The port
        must be free on that host and reachable from the others. No other port is needed here;
        communication between devices uses ports of its own. See `easy_jax.parallel.listening` for
        the network interfaces on which process 0 listens.
      num_processes: number of processes of the run.
      process_id: id of this process, from 0 to `num_processes` - 1.
      timeout: seconds to wait for the others at the start, and later without any heartbeat before a
        process counts as lost.

    Raises:
      ConfigError: a value is invalid, or some values are known and others cannot be determined.
      PeersError: some processes did not connect in time, or belong to another run or version; the
        message names them.
    """
    global _peers
    values: dict[str, Any] = {
        "coordinator_address": coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number("num_processes", num_processes),
        "process_id": _number("process_id", process_id),
    }
    if not 0 < timeout < float("inf"):
        raise ConfigError(f"peer_timeout is {timeout}; it must be a positive number of seconds")
    devices = None
    if None in values.values():
        *found, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            values["coordinator_address"],
            values["num_processes"],
            values["process_id"],
            None,
            None,
            int(timeout),
        )
        values = dict(zip(values, found, strict=True))
    address, count, index = values.values()
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return  # no cluster
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not given, and no cluster detected that provides it; give all "
            "of --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        )
    if not 0 <= index < count:
        raise ConfigError(f"process_id is {index}; it must be from 0 to num_processes - 1")
    if count == 1:
        return
    version = importlib.metadata.version("easy-jax")
    run = [version, *_common(sys.argv[1:])]
    peers = Peers(address, count, index, timeout=timeout, run=run)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        count,
        index,
        devices,
        initialization_timeout=int(timeout) + 1,
        coordinator_bind_address=peers.bind_address,
        heartbeat_timeout_seconds=2 * int(timeout) + 10,  # so that our messages come first
    )
    _peers = peers
    begins, ends = (functools.partial(_note_compilation, begins) for begins in (True, False))
    jax.monitoring.register_scalar_listener(begins)
    jax.monitoring.register_event_duration_secs_listener(ends)


def shutdown() -> None:
    """Waits until all processes have reached the end of the run, and disconnects."""
    global _peers
    if _peers is not None:
        barrier("end")
        jax.distributed.shutdown()
        _peers.close()
        _peers = None


def abort(code: int, message: str, *, at_once: bool = False) -> None:
    """Ends this process and all others of the run with the same exit code.

    The error may only be a consequence of the loss of another process. The function therefore gives
    `easy_jax.parallel.watch` a few seconds to detect that loss, in which case this process ends
    with a message about the lost process instead.

    Args:
      code: the exit code.
      message: the reason, which the other processes print.
      at_once: do not wait for threads that are still reading or saving. After an interrupt, such
        threads may outlive the interpreter and crash.
    """
    if _peers is not None:
        time.sleep(_ECHO_SECONDS)
        _peers.fail(code, message)
    elif not at_once:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: JAX would wait for the others


def is_main_process() -> bool:
    """Returns whether this is process 0, which alone writes reports, metadata and messages."""
    return jax.process_index() == 0


def gather(what: str, value: Any) -> list[Any]:
    """Returns the values of all processes, by process id; all processes must call it.

    Args:
      what: description of the exchange, printed if the run makes no progress.
      value: the JSON-serialisable value of this process.
    """
    at(what)
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    rows = multihost_utils.process_allgather(_padded(text, int(sizes.max())))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast(what: str, make: Callable[[], Any]) -> Any:
    """Returns a value that process 0 computes to all processes; all processes must call it.

    Use it for the content of files, because a file that process 0 has just written may not be
    visible to other processes yet.

    Args:
      what: description of the exchange, printed if the run makes no progress.
      make: returns a JSON-serialisable value; called in process 0 only.
    """
    at(what)
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make()).encode() if is_main_process() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    row: np.ndarray = multihost_utils.broadcast_one_to_all(_padded(text, size))
    return json.loads(row[:size].tobytes())


def assert_equal_across_processes(what: str, /, **values: Any) -> None:
    """Checks that values are equal in all processes; all processes must call it.

    The processes exchange hashes, and the values only if the hashes differ.

    Args:
      what: description of the operation that needs equal values, for the error message.
      **values: JSON-serialisable values, by name.

    Raises:
      DisagreementError: a value differs; raised in every process. The message lists the values and
        the processes that have them.
    """
    if len(set(gather(what, fingerprints.of_json(values)))) == 1:
        return
    differences = []
    everywhere = gather(what, values)
    for name in values:
        found: dict[str, list[int]] = {}
        for index, theirs in enumerate(everywhere):
            found.setdefault(json.dumps(theirs[name], sort_keys=True), []).append(index)
        if len(found) > 1:
            them = " and ".join(
                f"{value} in {name_processes(them)}" for value, them in found.items()
            )
            differences.append(f"{name} is {them}")
    raise DisagreementError(
        f"the processes disagree at {what}: {'; '.join(differences)}. All processes need the same "
        "data, model and workdir; check for differing copies on the hosts. If the network file "
        "system lags, run the command again in a minute"
    )


def barrier(what: str) -> None:
    """Waits until every process has called it.

    Args:
      what: description of the point in the run, printed if the run makes no progress.
    """
    gather(what, None)


def at(place: str) -> None:
    """Records what this process is doing; printed if no process of the run makes progress."""
    if _peers is not None:
        _peers.at(place)


def stop_on_sigterm() -> None:
    """Makes SIGTERM a request to save and stop, which `should_stop` reports.

    A run of several processes needs no handler: JAX's preemption service has one and forwards a
    SIGTERM of any process to all.
    """
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, _note_sigterm)


def should_stop(place: str) -> bool:
    """Returns whether to save now and raise `Stopped`; the answer is the same in all processes.

    Call it once per batch in every process.

    Args:
      place: what has just been completed, such as `training step 7`.
    """
    at(place)
    if jax.process_count() == 1:
        return _asked_to_stop
    return multihost_utils.reached_preemption_sync_point(next(_calls))


def _padded(text: bytes, size: int) -> np.ndarray:
    """Pads bytes with zeros to a power of two above `size`, so that few lengths are compiled."""
    padded = np.zeros(1 << size.bit_length(), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return padded


def _note_compilation(begins: bool, event: str, *_: Any, **__: Any) -> None:
    if _peers is not None and event.startswith(_COMPILATION):
        _peers.compiles(begins)


def _note_sigterm(*_: Any) -> None:
    global _asked_to_stop
    _asked_to_stop = True


def _number(name: str, value: int | None) -> int | None:
    """Returns a given number, or that of the environment variable `JAX_NAME`; else None."""
    text = os.environ.get(f"JAX_{name.upper()}")
    if value is not None or text is None:
        return value
    with contextlib.suppress(ValueError):
        return int(text)
    raise ConfigError(f"JAX_{name.upper()} is {text!r}; it must be a number")


def _common(arguments: list[str]) -> list[str]:
    """Removes `process_id`, in every form of the flag, from command-line arguments."""
    common: list[str] = []
    for place, argument in enumerate(arguments):
        name = argument.lstrip("-").partition("=")[0]
        follows = place > 0 and arguments[place - 1].lstrip("-") == "process_id"
        if name != "process_id" and not follows:
            common.append(argument)
    return common
