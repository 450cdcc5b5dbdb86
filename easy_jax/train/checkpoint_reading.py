"""Reading of checkpoints that may be damaged: returns the content, or a short reason for failure.

Each process reads independently of the others: in Orbax's collective reads, processes that
succeed would wait for one that fails.
"""

import contextlib
import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from easy_jax.io import sealed

_STRAGGLERS = 0.3  # seconds to wait for reads that are still running after a failed one
_UNSTARTED = r"coroutine 'Store\._\w+' was never awaited"  # Orbax's ArrayMetadata Store


class Damage(Exception):  # noqa: N818, internal: users see its text only
    """Short description of what is wrong with a checkpoint."""


def is_step(name: str) -> bool:
    """Returns whether Orbax takes a folder of this name for a checkpoint."""
    return name.isascii() and name.isdigit()


def steps(directory: Path) -> list[str]:
    """Returns the names of the checkpoints in a directory, the latest one first."""
    if not directory.exists():
        return []
    names = [each.name for each in directory.iterdir() if is_step(each.name) and each.is_dir()]
    return sorted(names, key=int, reverse=True)


def why_unlisted(folder: Path, with_loss: bool) -> str:
    """Returns why Orbax would fail to list a checkpoint; empty if it can be listed.

    Args:
      folder: the checkpoint's folder.
      with_loss: whether Orbax also reads its loss, to find the checkpoint with the lowest one.
    """
    loss = folder / "metrics" / "metrics"
    try:
        if with_loss and loss.exists():
            sealed.read(loss, Damage, "")
    except Damage as error:
        return _reason(Damage(str(error).replace(f"{folder}/", "")))
    metadata = folder / "_CHECKPOINT_METADATA"

    def read(reader: ocp.Checkpointer) -> None:
        reader.metadata(folder)
        with contextlib.suppress(FileNotFoundError, ValueError):  # Orbax ignores these
            if not isinstance(json.loads(metadata.read_bytes()), dict | None):
                raise Damage(f"{metadata.name} is not a JSON object")

    return _attempt(read)[1]


def record_of(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Returns a checkpoint's record (identity, position, step), or None and the reason."""

    def read(reader: ocp.Checkpointer) -> dict[str, Any]:
        wanted = ocp.args.Composite(record=ocp.args.JsonRestore())
        found = reader.restore(folder, wanted).record
        record = sealed.unseal(found, "the record", Damage, "")
        if record["step"] != int(folder.name):
            raise Damage(f"it is the one of step {record['step']}, copied")
        return record

    return _attempt(read)


def state_of(folder: Path, like: Any) -> tuple[Any, str]:
    """Returns a checkpoint's arrays in the shardings of `like`, or None and the reason."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        like,
    )

    def read(reader: ocp.Checkpointer) -> Any:
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return reader.restore(folder, wanted).state

    return _attempt(read)


def _attempt(read: Callable[[ocp.Checkpointer], Any]) -> tuple[Any, str]:
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    with (
        _quietly(),
        ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader,
    ):
        try:
            return read(reader), ""
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for damage
            if "RESOURCE_EXHAUSTED" in str(error):
                raise  # out of memory: nothing is wrong with the checkpoint
            reason = _reason(error)
        gc.collect()
        time.sleep(_STRAGGLERS)
        return None, reason


def _reason(error: Exception) -> str:
    """Returns an error's message, shortened to one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split()).removesuffix("; ").removesuffix(";")
    name = "" if isinstance(error, Damage) else f"{type(error).__name__}: "
    return f"{name}{text[:120]}{'...' if len(text) > 120 else ''}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hides Orbax's own messages about damage, which the caller reports in one line.

    Orbax stops at the first array that cannot be read. Each of the other pending reads then
    fails with a traceback, because its event loop is closed; those that had not begun are warned
    about as coroutines that were never awaited, whenever they are collected.
    """
    hooks = sys.excepthook, sys.unraisablehook

    def follows(error: BaseException | None) -> bool:
        return "Event loop is closed" in str(error) or "while reading array index" in str(error)

    def excepthook(kind: Any, error: BaseException, traceback: Any) -> None:
        if not follows(error):
            hooks[0](kind, error, traceback)

    def unraisablehook(raised: Any) -> None:
        if not follows(raised.exc_value):
            hooks[1](raised)

    absl = logging.getLogger("absl")
    logging.getLogger("asyncio").addFilter(_is_unrelated)  # stays: asyncio logs them late
    absl.addFilter(_is_unrelated)
    warnings.filterwarnings("ignore", _UNSTARTED, RuntimeWarning)  # stays, too
    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        absl.removeFilter(_is_unrelated)


def _is_unrelated(record: logging.LogRecord) -> bool:
    """Returns whether a log record is about something other than a failed read."""
    if record.name == "absl":
        return "orbax" not in Path(record.pathname).parts
    error = str(record.exc_info[1]) if record.exc_info else ""
    late = "exception was never retrieved" in record.getMessage()
    return not (late and ("OCDBT" in error or "TensorStore" in error))
