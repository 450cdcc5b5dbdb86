"""Readers of text records from files; each requested field is a list in the records' order.

A record's position is its example's id, even if other records are unusable. In a JSON-lines file
it is the number of the line, counted from 0.
"""

import bisect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from easy_jax.data.bad_examples import BadExamples, tell_unread
from easy_jax.data.sources import DataError, TfdsSource, open_tfds

_SLICE = 4096  # records at a time
_BOM = b"\xef\xbb\xbf"

_Path = str | os.PathLike[str]
_Bad = tuple[str, str]  # what is wrong with a record, and details
_Rows = Iterator[Mapping[str, Any] | _Bad]
Columns = dict[str, list[Any]]


def read_jsonl(
    path: _Path,
    fields: Sequence[str],
    *,
    optional: Sequence[str] = (),
    bad: BadExamples | None = None,
) -> Columns:
    """Reads string fields of a UTF-8 file with one JSON object per line, in its order.

    Args:
      path: of the file; a byte order mark at its beginning is ignored.
      fields: names that every record has, with strings.
      optional: names that records may have, with any values; None for records without them.
      bad: collects unusable records, whose fields are then empty; `tokenize` refuses them or
        leaves them out together with its own. Default: they are refused here, all at once.

    Raises:
      DataError: the file cannot be read, is empty, has none of the fields or has conversations;
        or lines are blank (except at the end), not UTF-8 or not JSON objects, or fields are
        missing or not strings.

    Warns:
      DataWarning: the records have other fields, which are not read; with the number of records
        that have something in them.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "sums.jsonl"
      >>> _ = path.write_text('{"q": "2 + 2 =", "a": "4"}')
      >>> read_jsonl(path, ["q", "a"])
      {'q': ['2 + 2 ='], 'a': ['4']}
    """
    return read_records(
        _json_rows(path),
        path,
        fields,
        optional=optional,
        bad=bad,
        where=lambda i: f"line {i + 1}",
    )


def read_records(
    records: Iterable[Mapping[str, Any] | _Bad],
    path: _Path,
    fields: Sequence[str],
    *,
    optional: Sequence[str] = (),
    bad: BadExamples | None = None,
    where: Callable[[int], str] = "record {}".format,
) -> Columns:
    """Reads string fields of records in memory.

    Args:
      records: in order; instead of a record that cannot be read, the reason and details.
      path: of the file or folder, for messages.
      where: a function from a position to the name of that record in messages.

    The other arguments, errors and warnings are those of `read_jsonl`.
    """
    bad, own = (BadExamples(), True) if bad is None else (bad, False)
    bad.source, bad.where = f"{path}", where
    others: Counter[str] = Counter()
    rows = _without(records, {*fields, *optional}, others)
    columns = _columns(path, fields, optional, rows, bad)
    size = _settle(columns, bad, own)
    tell_unread(f"{path}", size, others)
    return columns


def _json_rows(path: _Path) -> _Rows:
    blank = 0
    try:
        # As bytes, because then only a line feed ends a line; strings may have other separators.
        with Path(path).open("rb") as file:
            for number, line in enumerate(file):
                line = line.removeprefix(_BOM) if number == 0 else line
                if not line.strip():
                    blank += 1
                    continue
                yield from [("blank line", "")] * blank  # those at the end are ignored
                blank = 0
                yield _json_row(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _json_row(line: bytes) -> Mapping[str, Any] | _Bad:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return "not UTF-8", str(error)
    except (ValueError, RecursionError) as error:
        return "not JSON", str(error)
    return row if isinstance(row, dict) else ("not a JSON object", str(row)[:40])


def _without(
    rows: Iterable[Mapping[str, Any] | _Bad], read: set[str], others: Counter[str]
) -> _Rows:
    """Yields the rows, and counts the values in fields other than these, by field."""
    for row in rows:
        if isinstance(row, Mapping):
            others.update(
                name
                for name, value in row.items()
                if name not in read and value not in (None, "", [], {})
            )
        yield row


def read_parquet(
    path: _Path,
    fields: Sequence[str],
    *,
    optional: Sequence[str] = (),
    bad: BadExamples | None = None,
) -> Columns:
    """Reads string columns of a Parquet file, or of a folder's *.parquet files in order of name.

    Arguments, errors and warnings are those of `read_jsonl`, with rows instead of lines; rows are
    counted from 0 in each file.

    Raises:
      DataError: no file, a file that cannot be read or no rows; or a column is missing, is
        not of strings or has nulls.

    Example:
      >>> import tempfile
      >>> import pyarrow as pa
      >>> from pyarrow import parquet
      >>> path = Path(tempfile.mkdtemp()) / "sums.parquet"
      >>> parquet.write_table(pa.table({"q": ["2 + 2 ="], "a": ["4"]}), path)
      >>> read_parquet(path, ["q", "a"])
      {'q': ['2 + 2 ='], 'a': ['4']}
    """
    files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise DataError(f"folder {path} has no *.parquet files")
    bad, own = (BadExamples(), True) if bad is None else (bad, False)
    starts: list[int] = []
    others: dict[str, int | None] = {}

    def rows() -> _Rows:
        count = 0
        for file in files:
            starts.append(count)
            for row in _parquet_rows(file, fields, optional, others):
                yield row
                count += 1

    def where(i: int) -> str:
        number = bisect.bisect_right(starts, i) - 1
        return f"{files[number].name} row {i - starts[number]}"

    bad.source, bad.where = f"{path}", where
    columns = _columns(path, fields, optional, rows(), bad)
    size = _settle(columns, bad, own)
    tell_unread(f"{path}", size, others)
    return columns


def _parquet_rows(
    file: Path, fields: Sequence[str], optional: Sequence[str], others: dict[str, int | None]
) -> _Rows:
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            missing = [field for field in fields if field not in names]
            if missing:
                raise DataError(f"{file} has no columns {missing}; it has {sorted(names)}")
            read = [*fields, *(name for name in optional if name in names)]
            others |= dict.fromkeys(name for name in names if name not in read)
            for batch in parquet.iter_batches(_SLICE, columns=read):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def read_tfds(
    name: str,
    split: str,
    data_dir: _Path,
    fields: Sequence[str],
    *,
    optional: Sequence[str] = (),
    bad: BadExamples | None = None,
) -> Columns:
    """Reads text features of a prepared TensorFlow Datasets split.

    `name`, `split` and `data_dir` are those of `TfdsSource`; the others, errors and warnings those
    of `read_jsonl`.

    Raises:
      DataError: the data set is not prepared there, or a feature is missing, not text or not
        UTF-8.

    Example:
      >>> read_tfds("gsm8k", "train", "data", ["question", "answer"])  # doctest: +SKIP
    """
    builder, _ = open_tfds(name, split, data_dir, fields)
    features = builder.info.features.keys()
    read = [*fields, *(field for field in optional if field in features)]
    source = TfdsSource(name, split, data_dir, {field: field for field in read})
    what = f"{name!r} in {data_dir}, split {split!r}"
    bad, own = (BadExamples(), True) if bad is None else (bad, False)
    bad.source, bad.where = what, "example {}".format

    def rows() -> _Rows:
        for start in range(0, len(source), _SLICE):
            positions = list(range(start, min(start + _SLICE, len(source))))
            yield from map(_decoded, source.__getitems__(positions))

    columns = _columns(data_dir, fields, optional, rows(), bad)
    size = _settle(columns, bad, own)
    tell_unread(what, size, dict.fromkeys(features - set(read)))
    return columns


def _decoded(record: Mapping[str, np.ndarray]) -> Mapping[str, Any] | _Bad:
    row = {}
    for field, value in record.items():
        text = value.tolist()  # bytes if it is text; `_columns` refuses anything else
        try:
            row[field] = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            return f"field {field!r} is not UTF-8", str(error)
    return row


def _columns(
    path: _Path, fields: Sequence[str], optional: Sequence[str], rows: _Rows, bad: BadExamples
) -> Columns:
    columns: Columns = {field: [] for field in [*fields, *optional]}
    names: set[str] = set()
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            bad.add(position, *row)
            row = {}
        names |= row.keys()
        for field in fields:
            value = row.get(field, "")
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                raise _conversations(f"{bad.source}, {bad.where(position)}", field, row)
            if field not in row:
                bad.add(position, f"no field {field!r}", f"it has {sorted(row)}")
            elif wrong := not_text(value):
                bad.add(position, f"field {field!r} is {wrong[0]}", wrong[1])
            columns[field].append("" if position in bad else value)
        for field in optional:
            columns[field].append(row.get(field))
    if not next(iter(columns.values())):
        raise DataError(f"{path} is empty: it has no records")
    absent = [field for field in fields if field not in names]
    if absent and names:
        chats = "; conversations are not read yet" if names & {"messages", "conversations"} else ""
        raise DataError(
            f"{path} has no field {absent[0]!r} in any record; it has {sorted(names)}{chats}"
        )
    return columns


def _conversations(where: str, field: str, row: Mapping[str, Any]) -> DataError:
    return DataError(
        f"{where}: field {field!r} is a list of messages: conversations are not read yet, only an "
        "instruction and a response in two fields of text (instruction_field, response_field); the "
        f"record has the fields {sorted(row)}, a message {sorted(row[field][0])}"
    )


def _settle(columns: Columns, bad: BadExamples, own: bool) -> int:
    size = len(next(iter(columns.values())))
    if own:
        bad.settle(size)
    return size


def not_text(value: Any) -> _Bad | None:
    """Returns why a value is not text, with a detail; None if it is text.

    Example:
      >>> not_text(3), not_text("3")
      (('int, not a string', ''), None)
    """
    if not isinstance(value, str):
        return f"{'null' if value is None else type(value).__name__}, not a string", ""
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's \\u escapes can make half a character
        return "not Unicode", str(error)
    return None
