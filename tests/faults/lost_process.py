"""Measures how the others learn of a lost process: from JAX alone, and from `easy_jax`.

  python tests/faults/lost_process.py --counts 2 4

starts real processes on the CPU that share arrays over loopback, kills (SIGKILL), freezes (SIGSTOP)
or leaves out one of them, and prints a row for each case: after how many seconds the others have
ended, with which exit codes, how many of them name the lost one, and what one of them says.
`jax.distributed` gets the same timeout as easy_jax. The processes either exchange arrays all the
time, or each works alone, as while a program is compiled or data are read.
"""

import argparse
import re
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import processes  # noqa: E402

SIGNALS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}
# How the two say which process is lost. JAX calls process 0 the leader.
LEADER = r"^.*\bleader .*"
NAMES = (
    r"^easy-jax: .*\bprocess {0} .*",
    r"^.*\bunhealthy .*:\n{0}\b.*",
    r"^.*\b[Tt]ask[: ]{0}\b.*",
    r"^.*names?:?\n? ?.*task:{0}\b.*",
)
LIMIT = 6  # timeouts; who is still there after that is called stuck
HERE, READY = "this one is here", "all are here"


def work(arguments):
    """One process: joins the others, and goes on until it is ended."""
    import jax

    from easy_jax.parallel import processes
    from easy_jax.parallel.rendezvous import EXIT_PEERS, PeersError

    address, count, index = (
        arguments.coordinator_address,
        arguments.num_processes,
        arguments.process_id,
    )
    print(HERE, flush=True)
    if arguments.by == "jax":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=int(arguments.peer_timeout),
            heartbeat_timeout_seconds=int(arguments.peer_timeout),
        )
        _go_on(arguments.exchanges)
        return
    try:  # as the command line does
        processes.initialize(address, count, index, timeout=arguments.peer_timeout)
        _go_on(arguments.exchanges)
    except PeersError as error:
        print(f"easy-jax: {error}", file=sys.stderr)
        sys.exit(EXIT_PEERS)
    except Exception as error:
        processes.abort(1, f"{type(error).__name__}: {error}")


def _go_on(exchanges):
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("start")
    print(READY, flush=True)
    while True:
        if exchanges:
            multihost_utils.sync_global_devices("again")
        time.sleep(0.02)


def measure(by, count, fault, lost, exchanges, timeout):
    """What becomes of the others: `(seconds of the last, exit codes, how many name it, words)`."""
    only = [index for index in range(count) if fault != "missing" or index != lost]
    with processes.Processes(
        ROOT,
        ["--by", by, *(["--exchanges"] if exchanges else [])],
        count,
        timeout=timeout,
        only=only,
        program=[__file__, "--work"],
    ) as run:
        others = dict(zip(only, run.all, strict=True))
        for process in run.all:
            while (READY if fault != "missing" else HERE) not in process.printed:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
        begin = time.monotonic()
        if fault != "missing":
            time.sleep(1.0)
            run.signal(lost, SIGNALS[fault])
            begin = time.monotonic()
            del others[lost]
        while time.monotonic() - begin < LIMIT * timeout and None in _codes(others):
            time.sleep(0.02)
        seconds, codes = time.monotonic() - begin, _codes(others)
        for process in others.values():
            process.kill()
        errors = [process.communicate()[1] for process in others.values()]
    found = list(filter(None, (_naming(text, lost) for text in errors)))
    return seconds, codes, len(found), found[0] if found else errors[0].strip().split("\n")[0]


def _naming(text, lost):
    """What a process says that names the lost one."""
    for pattern in (*NAMES, *[LEADER][lost:]):
        if match := re.search(pattern.format(lost), text, re.MULTILINE):
            return match.group().replace("\n", " ")
    return ""


def _codes(others):
    return [process.poll() for process in others.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--faults", nargs="+", default=["killed", "frozen", "missing"])
    parser.add_argument("--timeout", type=int, default=10)
    parser.add_argument("--by", nargs="+", default=["jax", "easy_jax"])
    parser.add_argument("--words", type=int, default=160, help="how much of a message is printed")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--exchanges", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (
        ("coordinator_address", str),
        ("num_processes", int),
        ("process_id", int),
        ("peer_timeout", float),
    ):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        arguments.by = arguments.by[0]
        work(arguments)
        return
    print("| processes | fault | others | by | ended after | exit codes | name it | words |")
    print("|---:|---|---|---|---:|---|---:|---|")
    for count in arguments.counts:
        for fault in arguments.faults:
            for lost in (count - 1, 0):
                for exchanges in [True] if fault == "missing" else [True, False]:
                    for by in arguments.by:
                        seconds, codes, named, words = measure(
                            by, count, fault, lost, exchanges, arguments.timeout
                        )
                        does = {True: "exchange", False: "work alone"}[exchanges]
                        does = "start" if fault == "missing" else does
                        print(
                            f"| {count} | {lost} {fault} | {does} | {by} | {seconds:.1f} s | "
                            f"{', '.join('stuck' if c is None else str(c) for c in codes)} | "
                            f"{named} of {len(codes)} | {words[: arguments.words]} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
