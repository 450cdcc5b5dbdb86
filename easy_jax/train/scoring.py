"""Scoring: a jitted, mesh-sharded pass of the frozen model over the data, into a loss table."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from easy_jax import data
from easy_jax.io import code_fingerprint, files
from easy_jax.io import fingerprint as fingerprints
from easy_jax.io.code_fingerprint import name_of
from easy_jax.io.progress import Part
from easy_jax.io.terminal import shown
from easy_jax.models.modes import eval_mode
from easy_jax.parallel import lock, processes, sharding
from easy_jax.train import checks, forward, loss_parts, loss_table
from easy_jax.train.loss_table import LossTable


class ScoringError(ValueError):
    """Error raised if examples have no usable loss; the message lists their ids."""


@lock.alone()
def score(
    model: nnx.Module,
    source: data.AnySource,
    directory: str | os.PathLike[str],
    *,
    loss_fn: Callable[..., tuple[jax.Array, ...]],
    batch_size: int = 256,
    mesh: Mesh | None = None,
    on_bad_example: Literal["error", "drop"] = "error",
    token_losses: bool = False,
    overwrite: bool = False,
    rows_per_part: int = 100_000,
    progress: bool | Callable[[int], None] | Part = True,
) -> LossTable:
    """Scores every example once with the frozen model; returns the loss table.

    A complete table is opened, not computed again; an interrupted one is continued at its
    missing rows. The model runs in eval mode, whatever mode it is in.

    Memory per process, in addition to the data: 18 bytes per example of the data set (its id
    twice, 8 bytes each, and a flag), briefly 42 at the start, and about 36 more for packed text.
    Until a part is written, up to 260 bytes for each of its rows; with token losses, 120 more per
    row and 8 per token.

    Args:
      model: the pre-trained (for vision: linear-probed) model.
      source: the fine-tuning data.
      directory: where the table is written; created if it does not exist.
      loss_fn: the loss function, `(model, batch) -> (loss_sum_B, count_B)`, one entry per example,
        unreduced; the loss is their quotient. If it returns losses only, each count is 1.
      batch_size: examples per batch, over all devices and processes; for a packed source, rows.
        The last batch is padded; the table has no rows for padding.
      mesh: the device mesh; default: all devices on the data axis.
      on_bad_example: what to do with examples whose loss is not finite or whose count is 0 (no
        target token): raise an error, after the other ones have been saved, or drop them. The
        table's `dropped_ids` are these and those of the source.
      token_losses: whether to store every target token's loss as well, for token-wise weights. The
        loss function then returns them as a third array, like `easy_jax.causal_lm_token_losses`.
      overwrite: whether to delete the table in the directory and start from the first example.
      rows_per_part: rows between two saves.
      progress: whether to show a progress bar on standard error (outside terminals and notebooks,
        one line per minute); or a function that is called with the number of examples scored
        after every batch.

    Raises:
      LossTableError: the directory has a table of another model, data set or loss function, which
        is compared by its code and closed-over values (`easy_jax.io.code_fingerprint`).
      ScoringError: there are bad examples; the message gives their ids.
      LockError: another run is using the directory.
      ContractError: the model is not a Flax NNX module; or the loss function does not return
        losses and counts, or its losses depend on other examples of the batch, like a batch mean.
      DisagreementError: processes differ in their model, data or rows.
      ConfigError: the batch size does not divide over the mesh.
      DataError: the loader refuses the data, the head has other classes than the data
        (`easy_jax.train.compatibility`), or labels or tokens exceed the model's outputs.
      ValueError: the loss function returns token losses but `token_losses` is False, or vice versa.

    Example:
      >>> import tempfile
      >>> from easy_jax.core.losses import squared_error
      >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
      >>> source = data.ArraySource({"x": np.ones((5, 1), "f"), "y": np.ones((5, 1), "f")})
      >>> table = score(model, source, tempfile.mkdtemp(), batch_size=8,
      ...               loss_fn=lambda model, batch: squared_error(model(batch["x"]), batch["y"]))
      >>> table.num_examples
      5
    """
    directory = files.path(directory)
    checks.check_call("score", model, source)
    mesh = sharding.make_mesh() if mesh is None else mesh
    sharding.check_batch_size(batch_size, mesh, "scoring batch_size")
    drop = on_bad_example == "drop"
    # With "drop", labels and tokens out of range are dropped with the other bad examples.
    checks.check_match(model, source, loss_fn, np.zeros(len(source), bool) if drop else None)
    graphdef, state = nnx.split(eval_mode(model))
    identity = _identity(graphdef, state, source, loss_fn, token_losses)
    start: dict[str, Any] = {**identity, "batch_size": batch_size}
    processes.assert_equal_across_processes("the start of scoring", **start)
    if overwrite:
        processes.broadcast("the start of scoring", lambda: loss_table.clear(directory))
    job = _Job(directory, source, identity, batch_size, rows_per_part, drop, mesh)
    done_N, complete = job.read()
    if complete is not None:
        return complete
    bad: dict[int, str] = {}
    stopped = False
    if not done_N.all():
        loader, writer = job.loader_and_writer(np.flatnonzero(~done_N))
        state = sharding.shard_tree(state, mesh)
        step = forward.make_score_step(
            graphdef, loss_fn, mesh, code_fingerprint.of_function(loss_fn)
        )
        results = forward.per_example(step, state, loader, mesh, check=name_of(loss_fn))
        with shown(progress, "scoring", "examples", quiet=not processes.is_main_process()) as part:
            part.begin(len(source), int(done_N.sum()), jax.process_count())
            for number, (ids, loss_sum, count, *tokens) in enumerate(results):
                if number == 0:
                    job.begin(bool(tokens), name_of(loss_fn))
                good, loss, found = _judged(ids, loss_sum, count)
                bad |= found
                writer.add(ids, good, loss, count, *tokens)
                part.advance(len(ids))
                stopped = processes.should_stop(f"scoring batch {number + 1}")
                if stopped:
                    break
        if bad and drop:
            job.write_dropped(bad)
        writer.flush(last=True)
    if stopped:
        raise processes.Stopped(f"stopped while scoring; what is done is in {directory}")
    if not drop:
        _raise_bad(bad, len(source))
    return job.complete()


def _identity(
    graphdef: nnx.GraphDef[Any],
    state: nnx.State,
    source: data.AnySource,
    loss_fn: Callable[..., tuple[jax.Array, ...]],
    token_losses: bool,
) -> dict[str, Any]:
    """Returns everything a loss table depends on, which is stored in it and compared later."""
    return {
        "model": fingerprints.of_state(state),
        "structure": code_fingerprint.of_structure(graphdef),
        "data": data.fingerprint(source),
        "loss": code_fingerprint.of_function(loss_fn),
        "num_examples": len(source),
        "token_losses": token_losses,
    }


def _judged(
    ids: np.ndarray, loss_sum: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Returns which examples have a usable loss, all losses, and `{bad id: what is wrong}`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        loss = loss_sum / count
    usable = np.isfinite(loss) & (loss >= 0)  # the median's histogram has no negatives
    good = usable & (count != 0)
    wrong = zip(ids[~good], count[~good], loss[~good], strict=True)
    return (
        good,
        loss,
        {int(i): "has no target token" if n == 0 else f"has loss {x}" for i, n, x in wrong},
    )


@dataclasses.dataclass
class _Job:
    """Progress of scoring: reads an existing table, and writes its metadata and summary."""

    directory: Path
    source: data.AnySource
    identity: dict[str, Any]
    batch_size: int
    rows_per_part: int
    drop: bool
    mesh: Mesh
    absent: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    dropped: set[int] = dataclasses.field(default_factory=set)

    def read(self) -> tuple[np.ndarray, LossTable | None]:
        """Returns which examples are done, bool by id; and the table, if it is complete.

        Raises:
          LossTableError: the directory has a table of another model, data or loss function.
        """
        directory, size = self.directory, len(self.source)
        metadata = processes.broadcast(
            "reading the loss table's metadata", lambda: loss_table.read_metadata(directory)
        )
        if metadata is not None:
            loss_table.check_metadata(directory, metadata, self.identity)
        done_N = loss_parts.seen_ids(directory, size)
        # If bad examples are errors now, those that an earlier run dropped are scored again.
        self.dropped = loss_table.read_dropped(directory) if self.drop else set()
        self.absent = np.setdiff1d(np.arange(size), data.present_ids(self.source))
        done_N[[*self.dropped, *self.absent]] = True
        found = f"{done_N.sum()} of {size}, {fingerprints.of_arrays({'done': done_N})}"
        # Checked before any process writes.
        processes.assert_equal_across_processes("reading the loss table", rows=found)
        if metadata is not None and metadata["complete"] and done_N.all():
            table = LossTable(directory, metadata)
            table.check_rows()
            return done_N, table
        with files.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return done_N, None

    def loader_and_writer(self, todo: np.ndarray) -> tuple[data.Loader, loss_parts.PartWriter]:
        """Returns a loader of the missing examples, and a writer of this process's rows."""
        rows = sharding.process_rows(self.batch_size, self.mesh)
        loader = data.scoring_loader(self.source, self.batch_size, ids=todo, rows=rows)
        owned = rows[sharding.owned_rows(self.batch_size, self.mesh)]
        ids = loader.ids_in(owned, self.batch_size)
        return loader, loss_parts.PartWriter(self.directory, self.rows_per_part, ids)

    def begin(self, has_token_losses: bool, name: str) -> None:
        """Writes the metadata; called after the first batch has been scored.

        Written earlier, the metadata of an incorrect call would make the corrected call fail.
        Written later, there could be a part without metadata.
        """
        wanted = self.identity["token_losses"]
        if has_token_losses != wanted:
            raise ValueError(
                f"token_losses is {wanted}, but {name} returns {2 + has_token_losses} arrays; "
                "token losses are the third"
            )
        if processes.is_main_process():
            loss_table.write_metadata(self.directory, {**self._header, "complete": False})
        processes.barrier("writing the loss table's metadata")

    def write_dropped(self, bad: Mapping[int, str]) -> None:
        ids = self.dropped | set(bad)
        loss_table.write_dropped(self.directory, jax.process_index(), ids)

    def complete(self) -> LossTable:
        """Writes the summary of all processes' rows; returns the table."""
        lock.check(self.directory)
        processes.barrier("the end of scoring")
        metadata = processes.broadcast("the loss table's summary", self._summary)
        table = LossTable(self.directory, metadata)
        if not processes.is_main_process():  # the main process has, in `_summary`
            table.check_rows()
        return table

    def _summary(self) -> dict[str, Any]:
        dropped = loss_table.read_dropped(self.directory) if self.drop else set()
        summary = loss_table.summarise(self.directory, self.identity["token_losses"])
        dropped_ids = sorted(dropped | set(self.absent.tolist()))
        ends = {"complete": True, "dropped_ids": dropped_ids}
        metadata = {**self._header, **summary, **ends}
        table = LossTable(self.directory, metadata)
        table.check_ids()  # no summary of a table with missing rows
        metadata["losses"] = table.fingerprint()
        loss_table.write_metadata(self.directory, metadata)
        return metadata

    @property
    def _header(self) -> dict[str, Any]:
        return {"format_version": loss_table.FORMAT_VERSION, **self.identity}


def _raise_bad(bad: dict[int, str], num_examples: int) -> None:
    """Raises ScoringError in every process if any of them has found a bad example."""
    first = sorted(bad.items())[:10]
    parts = processes.gather("bad examples", {"count": len(bad), "first": first})
    count = sum(part["count"] for part in parts)
    if count:
        worst = sorted(tuple(item) for part in parts for item in part["first"])[:10]
        some = "; ".join(f"id {i} {why}" for i, why in worst)
        raise ScoringError(
            f"{count} of {num_examples} examples cannot be scored: {some}"
            f"{'; ...' if count > 10 else ''}. Fix the data, or set on_bad_example='drop' "
            "to leave them out of training"
        )
