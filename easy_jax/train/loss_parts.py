"""Rows of a loss table (`easy_jax.train.loss_table`): Parquet files written by each process.

Each example has one row. If two runs have scored into one directory at the same time, there may
be two; readers then skip the second, provided that both are equal.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from easy_jax.io import files, sealed
from easy_jax.io import fingerprint as fingerprints

SCHEMA = pa.schema([("example_id", pa.int64()), ("loss", pa.float32()), ("count", pa.float32())])
TOKEN_SCHEMA = SCHEMA.append(pa.field("token_losses", pa.list_(pa.float32())))
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


class LossTableError(ValueError):
    """Error raised if a loss table is missing, damaged, incomplete or of another model or data."""


def write_part(
    directory: Path, process: int, rows: Rows, token_losses: Sequence[np.ndarray] | None = None
) -> None:
    """Writes a further part atomically."""
    numbers = [int(p.stem[-5:]) for p in directory.glob(f"part-{process:05d}-*.parquet")]
    number = max(numbers, default=-1) + 1  # not the count: a part may have been deleted
    path = directory / f"part-{process:05d}-{number:05d}.parquet"
    columns, schema = [pa.array(column) for column in rows], SCHEMA
    if token_losses is not None:
        offsets = np.cumsum([0, *map(len, token_losses)], dtype=np.int32)
        columns.append(pa.ListArray.from_arrays(offsets, np.concatenate(token_losses)))
        schema = TOKEN_SCHEMA
    batch = pa.record_batch(columns, schema=schema)
    schema = schema.with_metadata({sealed.KEY: _checksum([batch])})
    content = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), content, write_page_checksum=True)
    files.write(path, content.getvalue())


def _checksum(batches: Iterable[pa.RecordBatch]) -> str:
    """Returns a checksum of the rows in order, independent of their division into batches."""
    digests: dict[str, Any] = {}

    def add(name: str, values: pa.Array) -> None:
        digests.setdefault(name, hashlib.sha256()).update(values.to_numpy().tobytes())

    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name == "token_losses":
                add("lengths", column.value_lengths())
                column = column.flatten()
            add(name, column)
    return fingerprints.of_json({name: digest.hexdigest() for name, digest in digests.items()})


def iter_rows(directory: Path) -> Iterator[Rows]:
    """Streams the rows of all parts of a table, complete or incomplete; each example once."""
    for batch in _unique(_iter_batches(directory, SCHEMA.names)):
        ids, loss, count = (column.to_numpy() for column in batch.columns)
        yield ids, loss, count


def iter_token_losses(directory: Path) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Streams `(example_ids, target token losses of each example)` of all parts."""
    for batch in _unique(_iter_batches(directory, ["example_id", "token_losses"])):
        ids, lists = batch.columns
        yield ids.to_numpy(), np.split(lists.flatten().to_numpy(), lists.offsets.to_numpy()[1:-1])


def _unique(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Drops repeated rows of an example; `seen_ids` has checked that they are equal."""
    seen_N = np.zeros(0, bool)
    for batch in batches:
        ids = batch.column(0).to_numpy()
        if ids.size and ids.max() >= seen_N.size:
            seen_N = np.pad(seen_N, (0, max(int(ids.max()) + 1, 2 * seen_N.size) - seen_N.size))
        first = np.zeros(ids.size, bool)
        first[np.unique(ids, return_index=True)[1]] = True
        new = first & ~seen_N[ids]
        seen_N[ids] = True
        if new.any():
            yield batch if new.all() else batch.filter(pa.array(new))


def _iter_batches(directory: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    for path in sorted(directory.glob("part-*.parquet")):
        with _opened(path) as file:
            yield from file.iter_batches(columns=columns)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Opens a part for reading; errors are reported with its path."""
    try:
        with (
            path.open("rb") as opened,
            pq.ParquetFile(opened, page_checksum_verification=True) as file,
        ):
            schema = file.schema_arrow
            if not (schema.equals(SCHEMA) or schema.equals(TOKEN_SCHEMA)):
                types = ", ".join(map(str, schema.types))
                raise LossTableError(
                    f"{path} has columns {schema.names} of types {types}; a loss table has "
                    f"{TOKEN_SCHEMA.names} of types {', '.join(map(str, TOKEN_SCHEMA.types))}, the "
                    "last one optional"
                )
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LossTableError(f"{path} is damaged: {reason}; delete it and score again") from error


def check_parts(directory: Path) -> None:
    """Raises LossTableError if a part was changed after it was written."""
    for path in sorted(directory.glob("part-*.parquet")):
        with _opened(path) as file:
            expected = (file.schema_arrow.metadata or {}).get(sealed.KEY.encode(), b"")
            if _checksum(file.iter_batches()).encode() != expected:
                raise LossTableError(
                    f"{path} was changed after it was written: its checksum is of other rows; "
                    "delete it and score again"
                )


def seen_ids(directory: Path, num_examples: int) -> np.ndarray:
    """Returns which examples have a row, bool by example id.

    Raises:
      LossTableError: a part is damaged, an id is out of range, or an id has different rows.
    """
    check_parts(directory)
    seen_N, twice_N = np.zeros(num_examples, bool), np.zeros(num_examples, bool)
    for batch in _iter_batches(directory, ["example_id"]):
        ids = batch.column(0).to_numpy()
        outside = ids[(ids < 0) | (ids >= num_examples)]
        if outside.size:
            raise LossTableError(
                f"the loss table in {directory} has ids {outside[:10].tolist()}, outside of "
                f"[0, {num_examples})"
            )
        unique, counts = np.unique(ids, return_counts=True)
        twice_N[unique[(counts > 1) | seen_N[unique]]] = True
        seen_N[ids] = True
    if twice_N.any():
        _check_same(directory, twice_N)
    return seen_N


def _check_same(directory: Path, twice_N: np.ndarray) -> None:
    """Raises LossTableError unless all rows of each of these examples are equal.

    Repeated rows come from two runs that scored into one directory at the same time.
    """
    rows: dict[int, Any] = {}
    different = set()
    for batch in _iter_batches(directory):
        for row in batch.filter(pa.array(twice_N[batch.column(0).to_numpy()])).to_pylist():
            if rows.setdefault(row["example_id"], row) != row:
                different.add(row["example_id"])
    if different:
        raise LossTableError(
            f"the loss table in {directory} has duplicate example ids with different losses: "
            f"{sorted(different)[:10]}; delete it and score again"
        )


class PartWriter:
    """Writer that collects rows, sorts them by example id, and writes them in parts.

    Packing yields examples slightly out of order. A row is written once all rows with smaller
    ids have been seen, so that ids are also sorted across parts.

    Args:
      directory: the loss table's directory.
      rows_per_part: number of collected rows at which a part is written.
      todo: sorted ids of the examples that this process scores.
    """

    def __init__(self, directory: Path, rows_per_part: int, todo: np.ndarray):
        self._directory = directory
        self._rows_per_part = rows_per_part
        self._todo = todo
        self._buffer: list[tuple[Any, ...]] = []  # id, good, loss, count[, token losses]

    def add(
        self,
        ids: np.ndarray,
        good: np.ndarray,
        loss: np.ndarray,
        count: np.ndarray,
        tokens: list[np.ndarray] | None = None,
    ) -> None:
        columns = [ids, good, loss, count, *([tokens] if tokens is not None else [])]
        self._buffer += zip(*columns, strict=True)
        if len(self._buffer) >= self._rows_per_part:
            self.flush()

    def flush(self, last: bool = False) -> None:
        self._buffer.sort(key=lambda row: row[0])
        found = np.array([row[0] for row in self._buffer], np.int64)
        in_turn = found == self._todo[: len(found)]
        # At the end, do not wait for missing ids: other processes have scored them.
        ready = len(found) if last or in_turn.all() else int(np.argmin(in_turn))
        rows = [row for row in self._buffer[:ready] if row[1]]
        self._buffer, self._todo = self._buffer[ready:], self._todo[ready:]
        if rows:
            ids, _, loss, count, *tokens = zip(*rows, strict=True)
            table: Any = (
                np.array(ids, np.int64),
                *(np.array(x, np.float32) for x in (loss, count)),
            )
            write_part(self._directory, jax.process_index(), table, *tokens)
