"""Several processes, one run: starting them, agreeing among them, stopping them in good order."""

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
from jax._src import clusters  # not public, but what `jax.distributed.initialize` goes by
from jax.experimental import multihost_utils

from easy_jax.io import fingerprint as fingerprints
from easy_jax.io.checks import ConfigError
from easy_jax.parallel.rendezvous import name_processes
from easy_jax.parallel.watch import Peers

_ECHO_SECONDS = 3.0
_COMPILATION = "/jax/core/compile/"  # tracing, lowering and XLA, when JAX tells of them
EXIT_STOPPED = 75  # saved after a SIGTERM: the same command again continues

_peers: Peers | None = None
_asked_to_stop = False
_calls = itertools.count()


class DisagreementError(ValueError):
    """Processes of a run differ in what must be the same; the message says which, and in what."""


class Stopped(Exception):  # noqa: N818, no error
    """The run was asked to stop (SIGTERM), and has saved where it is."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
) -> None:
    """Joins the processes of a run; call it before any other use of JAX.

    Arguments that are not given come from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, or from the cluster: TPU slices (also on GKE), SLURM, Kubernetes, Open MPI.
    One process alone is not a cluster: nothing happens. A process that is lost later ends all.

    The processes prove to each other that they are of one run: by the token in the environment
    variable `EASY_JAX_RUN_TOKEN`, the same in all, or else by their version and command line.

    Args:
      coordinator_address: `HOST:PORT` of process 0, `[HOST]:PORT` for an IPv6 address; the port
        must be free there, and open to the others. It is the only one that this needs: what
        devices use to talk is another. Process 0 listens on the interfaces that the address leads
        to (`easy_jax.parallel.listening`).
      num_processes, process_id: how many there are, and which this one is, from 0.
      timeout: seconds to wait for the others at the start, and to bear their silence later.

    Raises:
      ConfigError: some of the three are given and others cannot be found, or are wrong.
      PeersError: processes did not come in time (named), or are of another run or version.
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
            f"{', '.join(missing)} not given, and no cluster to find out from; give all of "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"
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
        heartbeat_timeout_seconds=2 * int(timeout) + 10,  # ours come first, and name the process
    )
    _peers = peers
    begins, ends = (functools.partial(_note_compilation, begins) for begins in (True, False))
    jax.monitoring.register_scalar_listener(begins)
    jax.monitoring.register_event_duration_secs_listener(ends)


def shutdown() -> None:
    """Leaves the run, when all processes have come to its end."""
    global _peers
    if _peers is not None:
        barrier("end")
        jax.distributed.shutdown()
        _peers.close()
        _peers = None


def abort(code: int, message: str, *, at_once: bool = False) -> None:
    """Ends this process and, of a run of several, the others with the same exit code.

    An error may be no more than the echo of a process that was lost: the watch over the peers
    is given the time to notice, and then ends this process with that message instead.

    Args:
      code: the exit code.
      message: for the others.
      at_once: do not wait for threads that still read or save. Interrupted, they may outlive
        Python, and crash.
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
    """Whether this process writes what is written once: reports, metadata, messages."""
    return jax.process_index() == 0


def gather(what: str, value: Any) -> list[Any]:
    """A JSON-serialisable value of every process, in their order; all processes must call it.

    Args:
      what: is gathered; named if a process does not come.
      value: this process's.
    """
    at(what)
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    rows = multihost_utils.process_allgather(_padded(text, int(sizes.max())))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast(what: str, make: Callable[[], Any]) -> Any:
    """A JSON-serialisable value that process 0 makes; all processes must call it.

    For what a file says: another process may not see yet what process 0 has just written.

    Args:
      what: is decided; named if a process does not come.
      make: called in process 0 alone.
    """
    at(what)
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make()).encode() if is_main_process() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    row: np.ndarray = multihost_utils.broadcast_one_to_all(_padded(text, size))
    return json.loads(row[:size].tobytes())


def assert_equal_across_processes(what: str, /, **values: Any) -> None:
    """Compares JSON-serialisable values, in one exchange of a hash; all processes must call it.

    Args:
      what: is begun.
      **values: by name, what each process has found out for itself.

    Raises:
      DisagreementError: in every process, if any two differ: names, processes and values.
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
        f"the processes differ at {what}: {'; '.join(differences)}. All need the same data, model "
        "and workdir: is there another copy on a host? A network file system may also be late "
        "to show what is new: then the same command, a minute later, continues"
    )


def barrier(what: str) -> None:
    """Waits until every process has come here."""
    gather(what, None)


def at(place: str) -> None:
    """Notes where this process is; printed, by process, if a run stops moving."""
    if _peers is not None:
        _peers.at(place)


def stop_on_sigterm() -> None:
    """From here on, SIGTERM asks the run to save and stop (see `should_stop`).

    Several processes need no handler: JAX's preemption service has one, and carries the
    notice of any of them to all.
    """
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, _note_sigterm)


def should_stop(place: str) -> bool:
    """Whether to save now and raise `Stopped`; all processes agree on the answer.

    Call it once for every batch, in every process.

    Args:
      place: what has just been done, such as `training step 7`.
    """
    at(place)
    if jax.process_count() == 1:
        return _asked_to_stop
    return multihost_utils.reached_preemption_sync_point(next(_calls))


def _padded(text: bytes, size: int) -> np.ndarray:
    """To a power of two above the size: every other length would be another compilation."""
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
    """A number that is given, or is in the environment."""
    text = os.environ.get(f"JAX_{name.upper()}")
    if value is not None or text is None:
        return value
    with contextlib.suppress(ValueError):
        return int(text)
    raise ConfigError(f"JAX_{name.upper()} is {text!r}; it must be a number")


def _common(arguments: list[str]) -> list[str]:
    """A command line without this process's number, in every way in which it can be given."""
    common: list[str] = []
    for place, argument in enumerate(arguments):
        name = argument.lstrip("-").partition("=")[0]
        follows = place > 0 and arguments[place - 1].lstrip("-") == "process_id"
        if name != "process_id" and not follows:
            common.append(argument)
    return common
