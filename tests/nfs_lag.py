"""Runs `easy-jax` with the lag of NFS: a file that was looked up before another process wrote it
stays invisible for half a minute. Here this applies to the files in `NAMES` only."""

import io
import os
import time

from easy_jax.cli.main import cli

SECONDS = 30.0
NAMES = {"config.json", "metadata.json", "cells.jsonl"}  # written by one process and read by all

_missed: dict[str, float] = {}
_stat, _open, _replace = os.stat, io.open, os.replace


def _key(path):
    return os.path.abspath(path)  # noqa: PTH100, pathlib's version would recurse


def _find(call, path, *args, **kwargs):
    """Calls a function that looks up a path, or raises FileNotFoundError while it is invisible."""
    if not isinstance(path, str | os.PathLike) or os.path.basename(path) not in NAMES:  # noqa: PTH119
        return call(path, *args, **kwargs)
    key = _key(path)
    if key in _missed and time.monotonic() - _missed[key] < SECONDS:
        raise FileNotFoundError(2, "No such file or directory (remembered)", str(path))
    try:
        return call(path, *args, **kwargs)
    except FileNotFoundError:
        _missed[key] = time.monotonic()
        raise


def _stat_late(path, *args, **kwargs):
    return _find(_stat, path, *args, **kwargs)


def _open_late(path, mode="r", *args, **kwargs):
    if "r" in mode:
        return _find(_open, path, mode, *args, **kwargs)
    _forget(path)
    return _open(path, mode, *args, **kwargs)


def _replace_late(source, target):
    _replace(source, target)
    _forget(target)


def _forget(path):
    """A process knows what it writes itself."""
    if isinstance(path, str | os.PathLike):
        _missed.pop(_key(path), None)


if __name__ == "__main__":
    os.stat, io.open, os.replace = _stat_late, _open_late, _replace_late
    cli()
