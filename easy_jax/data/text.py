"""Text: instruction/response pairs from files, tokenised into flat arrays."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from easy_jax import fingerprint as fingerprints
from easy_jax.config import ALPACA
from easy_jax.data.sources import DataError, Record, TfdsSource

_PLACEHOLDER = "{instruction}"
_SLICE = 4096  # records or texts at a time: encodings take far more memory than their ids

_Path = str | os.PathLike[str]
_Rows = Iterator[tuple[str, Mapping[str, Any]]]  # where a record is from, and the record


def read_jsonl(path: _Path, fields: Sequence[str]) -> dict[str, list[str]]:
    """String fields of a UTF-8 file with one JSON object per line, in its order.

    Raises:
      DataError: the file cannot be read or is empty; or a line is blank (but for those at the
        end), no UTF-8 or no JSON object, or a field is missing or no string.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "sums.jsonl"
      >>> _ = path.write_text('{"q": "2 + 2 =", "a": "4"}')
      >>> read_jsonl(path, ["q", "a"])
      {'q': ['2 + 2 ='], 'a': ['4']}
    """
    return _columns(path, fields, _json_rows(path))


def _json_rows(path: _Path) -> _Rows:
    blank = None
    try:
        # In bytes, only a line feed ends a line: strings may hold other line separators.
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    blank = blank or number
                    continue
                if blank:
                    raise DataError(f"{path}:{blank} is blank; remove the line")
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number} is not UTF-8: {error}") from error
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number} is not a JSON object: {str(row)[:40]}")
                yield f"{path}:{number}", row
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def read_parquet(path: _Path, fields: Sequence[str]) -> dict[str, list[str]]:
    """String columns of a Parquet file, or of a folder's *.parquet files in order of name.

    Raises:
      DataError: no file, a file that cannot be read or no rows; or a column is missing, is
        not of strings or has a null. Rows are counted from 0 in each file.
    """
    files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise DataError(f"folder {path} has no *.parquet files")
    return _columns(path, fields, (row for file in files for row in _parquet_rows(file, fields)))


def _parquet_rows(file: Path, fields: Sequence[str]) -> _Rows:
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            missing = [field for field in fields if field not in names]
            if missing:
                raise DataError(f"{file} has no columns {missing}; it has {sorted(names)}")
            batches = parquet.iter_batches(_SLICE, columns=list(fields))
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def read_tfds(
    name: str, split: str, data_dir: _Path, fields: Sequence[str]
) -> dict[str, list[str]]:
    """Text features of a prepared TensorFlow Datasets split; arguments as in `TfdsSource`.

    Raises:
      DataError: the data set is not prepared there, or a feature is missing, no text or no
        UTF-8.
    """
    source = TfdsSource(name, split, data_dir, {field: field for field in fields})

    def rows() -> _Rows:
        for start in range(0, len(source), _SLICE):
            positions = list(range(start, min(start + _SLICE, len(source))))
            for position, record in zip(positions, source.__getitems__(positions), strict=True):
                where = f"{name!r} in {data_dir}, split {split!r}, example {position}"
                yield where, {field: _decoded(record[field], field, where) for field in fields}

    return _columns(data_dir, fields, rows())


def _decoded(value: np.ndarray, field: str, where: str) -> Any:
    text = value.tolist()  # bytes if it is text; `_columns` refuses anything else
    try:
        return text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: field {field!r} is not UTF-8: {error}") from error


def _columns(path: _Path, fields: Sequence[str], rows: _Rows) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {field: [] for field in fields}
    empty = True
    for where, row in rows:
        empty = False
        for field, values in columns.items():
            if field not in row:
                raise DataError(f"{where} has no field {field!r}; it has {sorted(row)}")
            _check_string(row[field], f"{where}: field {field!r}")
            values.append(row[field])
    if empty:
        raise DataError(f"{path} is empty: it has no records")
    return columns


def _check_string(value: Any, where: str) -> None:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where} is {kind}, not a string; correct it or leave the record out")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's \u escapes can make half a character
        raise DataError(f"{where} is not Unicode: {error}") from error


def load_tokenizer(path: _Path) -> Tokenizer:
    """A tokenizer from its `tokenizer.json` (or the folder with it), which neither cuts nor pads.

    Raises:
      DataError: the file is missing or broken.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    fix = "only the fast format, `tokenizer.json`, is read: look for that file next to the model"
    if not file.is_file():
        raise DataError(f"{file} does not exist; {fix}")
    try:
        return _whole(Tokenizer.from_file(os.fspath(file)))
    except Exception as error:  # the library raises no narrower one
        raise DataError(f"{file} is not a tokenizer ({error}); {fix}") from error


class TokenSource:
    """Token sequences in memory; of each, the tokens from `target_start` on are targets.

    A record is `{"tokens": int32 [length], "target_start": int32}`; lengths differ.

    Args:
      tokens: the ids of all examples, one after the other.
      offsets: [N + 1], where each example starts, and the end of the last.
      target_start: [N], position within the example of its first target.
      eos_id: the token that ends a text, if there is one.
      max_length: the most tokens of an example; default: those of the longest.
      num_truncated, num_cut_tokens: examples cut to `max_length`, and tokens lost so.

    Raises:
      DataError: no examples, arrays that do not fit together, or examples without a target
        or without a token before it; the message gives the ids.

    Example:
      >>> source = TokenSource([5, 6, 2, 7, 2], [0, 3, 5], [1, 1], eos_id=2)
      >>> source[1]["tokens"].tolist(), source.num_targets.tolist()
      ([7, 2], [2, 1])
    """

    def __init__(
        self,
        tokens: Sequence[int] | np.ndarray,
        offsets: Sequence[int] | np.ndarray,
        target_start: Sequence[int] | np.ndarray,
        *,
        eos_id: int | None = None,
        max_length: int | None = None,
        num_truncated: int = 0,
        num_cut_tokens: int = 0,
    ):
        self.tokens = _integers("tokens", tokens, np.int32)
        self.offsets = _integers("offsets", offsets, np.int64)
        self.target_start = _integers("target_start", target_start, np.int32)
        if len(self) == 0:
            raise DataError("the data set is empty: it has no examples")
        ends = [0, len(self.tokens)]
        if len(self.offsets) != len(self) + 1 or self.offsets[[0, -1]].tolist() != ends:
            raise DataError(f"offsets must be {len(self) + 1}, from {ends[0]} to {ends[1]}")
        lengths = self.lengths
        _refuse(lengths < 0, "offsets decrease; they are where one example ends, the next starts")
        _refuse(self.target_start < 1, "no token before the target; use a prompt or a BOS token")
        _refuse(lengths <= self.target_start, "no target token; leave the examples out")
        self.max_length = int(lengths.max()) if max_length is None else max_length
        _refuse(lengths > self.max_length, f"more than max_length {self.max_length} tokens")
        self.eos_id = eos_id
        self.num_truncated = num_truncated
        self.num_cut_tokens = num_cut_tokens

    def __len__(self) -> int:
        return len(self.target_start)

    def __getitem__(self, position: int) -> Record:
        position = range(len(self))[position]
        start, stop = self.offsets[position : position + 2]
        return {"tokens": self.tokens[start:stop], "target_start": self.target_start[position]}

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each example."""
        return np.diff(self.offsets)

    @property
    def num_targets(self) -> np.ndarray:
        """int64 [N]: targets of each example."""
        return self.lengths - self.target_start

    @property
    def identity(self) -> dict[str, np.ndarray]:
        """What the fingerprint is of: all that training depends on."""
        return {name: getattr(self, name) for name in ("tokens", "offsets", "target_start")}

    def fingerprint(self) -> str:
        """Hash of the tokens, of where examples start and where their targets do."""
        return fingerprints.of_arrays(self.identity)

    def describe(self) -> str:
        """One line: examples, tokens, targets, and what was cut."""
        return (
            f"{len(self):,} examples, {len(self.tokens):,} tokens, "
            f"{self.num_targets.sum():,} targets; {self.num_truncated:,} examples cut to "
            f"{self.max_length:,} tokens, {self.num_cut_tokens:,} tokens lost"
        )


def tokenize(
    instructions: Sequence[str],
    responses: Sequence[str],
    tokenizer: Tokenizer,
    *,
    eos_token: str,
    template: str = ALPACA,
    max_length: int = 1024,
    bos_token: str | None = None,
) -> TokenSource:
    """Prompt, response and EOS tokenised as one text; response and EOS are the targets.

    The targets start after as many tokens as the prompt has on its own. No special tokens
    are added but those given here. Long examples are cut at the end and lose their EOS; none
    is left out, so that an example's id stays its position.

    Args:
      instructions, responses: texts, in equal number.
      tokenizer: the model's.
      eos_token: an added token of the tokenizer, put after every response.
      template: of the prompt, with `{instruction}` once; other braces mean nothing.
      max_length: the most tokens of an example.
      bos_token: put first, as part of the prompt; default: none.

    Raises:
      DataError: responses that are blank or have no token left within `max_length` (with the
        ids), a template without its placeholder, or a token the tokenizer does not have.

    Example:
      >>> from tokenizers import models, pre_tokenizers
      >>> tokenizer = Tokenizer(models.WordLevel({"2": 0, "+": 1, "=": 2, "4": 3}, "?"))
      >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> _ = tokenizer.add_special_tokens(["<eos>"])
      >>> source = tokenize(["2 + 2"], ["4"], tokenizer, eos_token="<eos>",
      ...                   template="{instruction} =")
      >>> source[0]["tokens"].tolist(), int(source[0]["target_start"])
      ([0, 1, 0, 2, 3, 4], 4)
    """
    if len(instructions) != len(responses):
        raise DataError(f"{len(instructions)} instructions for {len(responses)} responses")
    if template.count(_PLACEHOLDER) != 1:
        raise DataError(f"a template must have {_PLACEHOLDER} once: {template!r}")
    _check_texts("instruction", instructions)
    _check_texts("response", responses)
    blank_N = np.array([not response.strip() for response in responses])
    _refuse(blank_N, "the response is blank; write one or leave the examples out")
    eos_id = _token_id(tokenizer, eos_token, "EOS")
    bos = [] if bos_token is None else [_token_id(tokenizer, bos_token, "BOS")]

    # Not str.format: templates and instructions may have braces of their own.
    prompts = [template.replace(_PLACEHOLDER, instruction) for instruction in instructions]
    start_N = np.array([len(bos) + len(ids) for ids in _encode(tokenizer, prompts)])
    texts = (p + response + eos_token for p, response in zip(prompts, responses, strict=True))
    kept, full_lengths, ends = [], [], []
    for ids in _encode(tokenizer, texts):
        kept.append(np.array((bos + ids)[:max_length], np.int32))
        full_lengths.append(len(bos) + len(ids))
        ends.append(ids[-1:] == [eos_id])
    full_N = np.array(full_lengths)
    _refuse(~np.array(ends), f"{eos_token!r} is not read as one token; add it as special")
    _refuse(
        start_N >= full_N,
        "no more tokens with the response than without: it merges with the end of the prompt; "
        "end the template in another way",
    )
    _refuse(
        start_N >= max_length,
        f"no target token within max_length {max_length}; raise it above the prompts' tokens or "
        "leave the examples out",
        {"prompt tokens": start_N},
    )
    return _joined(
        kept,
        start_N,
        eos_id=eos_id,
        max_length=max_length,
        num_truncated=int((full_N > max_length).sum()),
        num_cut_tokens=int(np.maximum(full_N - max_length, 0).sum()),
    )


def plain_text(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    eos_token: str | None = None,
    bos_token: str | None = None,
) -> TokenSource:
    """Documents as one stream of tokens in pieces of `length`, for the perplexity of a text.

    All tokens but the first of a piece are targets. The last piece may be shorter; if that
    leaves it without a target, its token is counted as cut.

    Args:
      texts: the documents; empty ones have no tokens.
      tokenizer: the model's.
      length: tokens of a piece, at least 2.
      eos_token: put after every document that has tokens; default: none.
      bos_token: put before every piece, as one of its tokens; default: none.

    Raises:
      DataError: fewer than 2 tokens, or a token the tokenizer does not have.

    Example:
      >>> from tokenizers import models, pre_tokenizers
      >>> tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "?"))
      >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> source = plain_text(["a b b", "a a"], tokenizer, length=3)
      >>> [record["tokens"].tolist() for record in source]
      [[0, 1, 1], [0, 0]]
    """
    if length < 2:
        raise DataError(f"length is {length}; a piece needs at least 2 tokens")
    _check_texts("text", texts)
    eos = [] if eos_token is None else [_token_id(tokenizer, eos_token, "EOS")]
    bos = [] if bos_token is None else [_token_id(tokenizer, bos_token, "BOS")]
    documents = [np.array(ids + eos, np.int32) for ids in _encode(tokenizer, texts) if ids]
    stream = np.concatenate([*documents, np.zeros(0, np.int32)])
    body = length - len(bos)
    starts = range(0, len(stream), body)
    pieces = [np.append(bos, stream[i : i + body]).astype(np.int32) for i in starts]
    cut = int(bool(pieces) and len(pieces[-1]) < 2)
    pieces = pieces[: len(pieces) - cut]
    if not pieces:
        raise DataError(f"the texts have {len(stream)} tokens: too few for a target")
    return _joined(
        pieces,
        np.ones(len(pieces), np.int32),
        eos_id=eos[0] if eos else None,
        max_length=length,
        num_cut_tokens=cut,
    )


def check_vocabulary(data: TokenSource | int, vocab_size: int) -> None:
    """Raises DataError if a token (of the source, or the greatest id) is none of the model's."""
    greatest = int(data.tokens.max()) if isinstance(data, TokenSource) else data
    if greatest >= vocab_size:
        raise DataError(
            f"the data has token id {greatest}, the model a vocabulary of {vocab_size}: tokenizer "
            "and model do not belong together"
        )


def _joined(parts: list[np.ndarray], target_start: np.ndarray, **rest: Any) -> TokenSource:
    offsets = np.cumsum([0, *map(len, parts)])
    return TokenSource(np.concatenate(parts), offsets, target_start, **rest)


def _whole(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation and padding; a copy, if it has any."""
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    tokenizer = _whole(tokenizer)
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    texts = iter(texts)
    while part := list(itertools.islice(texts, _SLICE)):
        for encoding in encode(part, add_special_tokens=False):
            yield encoding.ids


def _token_id(tokenizer: Tokenizer, token: str, what: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise DataError(f"the {what} token {token!r} is not in the tokenizer's vocabulary")
    return token_id


def _check_texts(what: str, texts: Sequence[str]) -> None:
    if not len(texts):
        raise DataError("the data set is empty: it has no examples")
    for i, text in enumerate(texts):
        _check_string(text, f"{what} {i}")


def _integers(name: str, values: Sequence[int] | np.ndarray, dtype: type) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise DataError(f"{name} has dtype {array.dtype}, shape {array.shape}; use 1-D integers")
    if array.size and not 0 <= array.min() <= array.max() <= np.iinfo(dtype).max:
        raise DataError(f"{name} goes from {array.min()} to {array.max()}; use {dtype.__name__}")
    return array.astype(dtype, copy=False)


def _refuse(bad_N: np.ndarray, why: str, details: Mapping[str, np.ndarray] | None = None) -> None:
    """Raises DataError with the ids of the bad examples, if there are any."""
    ids = np.flatnonzero(bad_N)
    if ids.size:
        shown = {"ids": ids, **{name: array[ids] for name, array in (details or {}).items()}}
        lists = ", ".join(f"{name} {array[:10].tolist()}" for name, array in shown.items())
        more = " ..." if ids.size > 10 else ""
        raise DataError(f"{ids.size} examples, {lists}{more}: {why}")
