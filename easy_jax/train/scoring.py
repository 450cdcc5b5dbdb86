"""Scoring: one frozen, jitted, mesh-sharded pass over the data, into a loss table."""

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
    """Some examples have no usable loss; the message lists their ids."""


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

    Complete tables are opened, not made again; interrupted ones are continued at their
    missing rows. The model runs in eval mode, whatever mode it is in.

    Memory of each process, beside the data: 18 bytes for every example of the data set (its id
    twice, 8 bytes each, and a flag), 42 for a moment at the start, and for packed text some 36
    more; and until a part is written, up to 260 bytes for each of its rows, and with token losses
    120 more and 8 for each of them.

    Args:
      model: the pre-trained (for vision: linear-probed) model.
      source: the fine-tuning data.
      directory: of the table; made if it does not exist.
      loss_fn: `(model, batch) -> (loss_sum_B, count_B)`, one entry per example, unreduced; the
        loss is their quotient. Losses alone count 1 each.
      batch_size: global; padded at the end, padding never reaches the table. Rows, not
        examples, of a packed source.
      mesh: default: all devices on the data axis.
      on_bad_example: examples whose loss is not finite or whose count is 0 (no target
        token) are an error, after the good ones have been saved; or dropped and counted. The
        table's `dropped_ids` are these and those of the source.
      token_losses: keep every target token's loss as well, for token-wise weights. The loss
        function then returns them as a third array, as `easy_jax.causal_lm_token_losses` does.
      overwrite: delete the table in the directory and start anew.
      rows_per_part: rows between two saves.
      progress: whether to show a bar, on standard error (elsewhere than in a terminal or a
        notebook: a line a minute); or a function that is called with the number of examples
        scored after every batch.

    Raises:
      LossTableError: the directory has a table of another model, data set or loss function (its
        code and the values it closes over count; see `easy_jax.io.code_fingerprint`).
      ScoringError: bad examples, by id.
      LockError: another run is at work in the directory.
      ContractError: a model that is not NNX's; a loss function that returns anything else, or whose
        losses depend on the other examples of the batch, as a mean repeated does.
      DisagreementError: several processes, and not the same model, data or rows in all.
      ConfigError: a batch size that does not divide over the mesh.
      DataError: what the loaders refuse; a head that is not of the data's classes
        (`easy_jax.train.compatibility`); labels or tokens that the model has no output for.
      ValueError: a loss function with token losses where none are asked for, or without.

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
    """Returns what a loss table depends on; stored with it, and compared when it is opened."""
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
    """Which examples have a usable loss, the losses, and of the others what is wrong."""
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
    """A loss table in the making: what of it is there, what is written first and last."""

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
        """Which examples are done, bool by id; and the table, if it is complete.

        Raises:
          LossTableError: the directory has a table with other inputs.
        """
        directory, size = self.directory, len(self.source)
        metadata = processes.broadcast(
            "reading the loss table's metadata", lambda: loss_table.read_metadata(directory)
        )
        if metadata is not None:
            loss_table.check_metadata(directory, metadata, self.identity)
        done_N = loss_parts.seen_ids(directory, size)
        # Examples dropped before are looked at again where they are to be errors now.
        self.dropped = loss_table.read_dropped(directory) if self.drop else set()
        self.absent = np.setdiff1d(np.arange(size), data.present_ids(self.source))
        done_N[[*self.dropped, *self.absent]] = True
        found = f"{done_N.sum()} of {size}, {fingerprints.of_arrays({'done': done_N})}"
        # Before anybody writes.
        processes.assert_equal_across_processes("reading the loss table", rows=found)
        if metadata is not None and metadata["complete"] and done_N.all():
            table = LossTable(directory, metadata)
            table.check_rows()
            return done_N, table
        with files.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return done_N, None

    def loader_and_writer(self, todo: np.ndarray) -> tuple[data.Loader, loss_parts.PartWriter]:
        """Reads the examples that are missing, and writes this process's part of their rows."""
        rows = sharding.process_rows(self.batch_size, self.mesh)
        loader = data.scoring_loader(self.source, self.batch_size, ids=todo, rows=rows)
        owned = rows[sharding.owned_rows(self.batch_size, self.mesh)]
        ids = loader.ids_in(owned, self.batch_size)
        return loader, loss_parts.PartWriter(self.directory, self.rows_per_part, ids)

    def begin(self, has_token_losses: bool, name: str) -> None:
        """Writes the metadata, once the first batch has been scored.

        Not earlier: a call with a mistake would leave a table that refuses the next. Not later: a
        part must never be there without it.
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
        if not processes.is_main_process():  # it has
            table.check_rows()
        return table

    def _summary(self) -> dict[str, Any]:
        dropped = loss_table.read_dropped(self.directory) if self.drop else set()
        summary = loss_table.summarise(self.directory, self.identity["token_losses"])
        dropped_ids = sorted(dropped | set(self.absent.tolist()))
        ends = {"complete": True, "dropped_ids": dropped_ids}
        metadata = {**self._header, **summary, **ends}
        table = LossTable(self.directory, metadata)
        table.check_ids()  # the median is of all rows, or of none
        metadata["losses"] = table.fingerprint()
        loss_table.write_metadata(self.directory, metadata)
        return metadata

    @property
    def _header(self) -> dict[str, Any]:
        return {"format_version": loss_table.FORMAT_VERSION, **self.identity}


def _raise_bad(bad: dict[int, str], num_examples: int) -> None:
    """Raises ScoringError in every process if one of them has met a bad example."""
    first = sorted(bad.items())[:10]
    parts = processes.gather("bad examples", {"count": len(bad), "first": first})
    count = sum(part["count"] for part in parts)
    if count:
        worst = sorted(tuple(item) for part in parts for item in part["first"])[:10]
        some = "; ".join(f"id {i} {why}" for i, why in worst)
        raise ScoringError(
            f"{count} of {num_examples} examples cannot be scored: {some}"
            f"{'; ...' if count > 10 else ''}. Mend the data, or set on_bad_example='drop' "
            "to leave them out of training"
        )
