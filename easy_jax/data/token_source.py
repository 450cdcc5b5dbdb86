"""A source of token sequences of any lengths, in flat arrays."""

from collections.abc import Sequence

import numpy as np

from easy_jax.data import ragged
from easy_jax.data.ragged import Ragged
from easy_jax.data.sources import DataError, Record
from easy_jax.io import fingerprint as fingerprints

BORDERS = {
    "joined": "a target",
    "authors": "no target",
    "apart": "",  # there are none
}


class TokenSource:
    """Token sequences in memory; the tokens of a sequence from `target_start` on are targets.

    A record is `{"tokens": int32 [length], "target_start": int32}`; lengths differ.

    Args:
      tokens: the token ids of all examples, concatenated.
      offsets: [N + 1], where each example starts, and the end of the last.
      target_start: [N], position of the first target within the example.
      eos_id: the token that ends a text, if there is one.
      max_length: the maximal number of tokens of an example; default: that of the longest.
      num_truncated, num_cut_tokens: number of examples cut to `max_length`, and of lost tokens.
      weight: float32 [N], multiplied into the training weights; default: 1.
      token_weight: weights of the target tokens, multiplied into the training weights; default: 1.
      dropped_ids: ids of examples that are left out; they have no tokens, and are never read.
      border: the `border` option of `tokenize`, if it made the tokens.
      merged_ids: ids of examples in which the border of prompt and response is within a token.

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
        weight: Sequence[float] | np.ndarray | None = None,
        token_weight: Ragged | None = None,
        dropped_ids: Sequence[int] | np.ndarray = (),
        border: str | None = None,
        merged_ids: Sequence[int] | np.ndarray = (),
    ):
        self.tokens = _integers("tokens", tokens, np.int32)
        self.offsets = _integers("offsets", offsets, np.int64)
        self.target_start = _integers("target_start", target_start, np.int32)
        self.dropped_ids = _integers("dropped_ids", dropped_ids, np.int64)
        self.merged_ids = _integers("merged_ids", merged_ids, np.int64)
        self.weight = None if weight is None else _weights(weight, len(self))
        if len(self) == len(self.dropped_ids):
            raise DataError("the data set is empty: it has no examples")
        ends = [0, len(self.tokens)]
        if len(self.offsets) != len(self) + 1 or self.offsets[[0, -1]].tolist() != ends:
            raise DataError(f"offsets must be {len(self) + 1}, from {ends[0]} to {ends[1]}")
        lengths = self.lengths
        outside = self.dropped_ids[self.dropped_ids >= len(self)]
        if outside.size:
            raise DataError(f"dropped_ids {outside.tolist()} are not below {len(self)}")
        present = np.isin(np.arange(len(self)), self.dropped_ids, invert=True)
        _refuse(lengths < 0, "offsets decrease; they are where one example ends, the next starts")
        _refuse(
            ~present & (lengths + self.target_start > 0), "they are in dropped_ids, but have tokens"
        )
        _refuse(
            present & (self.target_start < 1),
            "no token before the target; use a prompt or a BOS token",
        )
        _refuse(present & (lengths <= self.target_start), "no target token; leave the examples out")
        self.max_length = int(lengths.max()) if max_length is None else max_length
        _refuse(lengths > self.max_length, f"more than max_length {self.max_length} tokens")
        self.eos_id = eos_id
        self.num_truncated = num_truncated
        self.num_cut_tokens = num_cut_tokens
        self.border = border
        self.token_weight = token_weight
        if token_weight is not None:
            ragged.check(token_weight, self.num_targets, np.zeros(len(self), bool))

    def __len__(self) -> int:
        return len(self.target_start)

    def __getitem__(self, position: int) -> Record:
        position = range(len(self))[position]
        start, stop = self.offsets[position : position + 2]
        return {"tokens": self.tokens[start:stop], "target_start": self.target_start[position]}

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, int64 [N]."""
        return np.diff(self.offsets)

    @property
    def num_targets(self) -> np.ndarray:
        """The number of target tokens of each example, int64 [N]."""
        return self.lengths - self.target_start

    @property
    def identity(self) -> dict[str, np.ndarray]:
        """The arrays that training depends on, of which `fingerprint` is a hash."""
        names = ["tokens", "offsets", "target_start", *["weight"] * (self.weight is not None)]
        arrays = {name: getattr(self, name) for name in names}
        if self.token_weight is not None:
            arrays["token_weight"] = self.token_weight.values
        return arrays

    def fingerprint(self) -> str:
        """Returns a hash of the tokens, the starts of examples and targets, and the weights."""
        return fingerprints.of_arrays(self.identity)

    def describe(self) -> str:
        """Returns one line: numbers of examples, tokens and targets; what was cut or dropped."""
        dropped = len(self.dropped_ids)
        parts = [
            f"{len(self) - dropped:,} examples, {len(self.tokens):,} tokens, "
            f"{self.num_targets.sum():,} targets",
            f"{self.num_truncated:,} examples cut to {self.max_length:,} tokens, "
            f"{self.num_cut_tokens:,} tokens lost",
        ]
        if dropped:
            parts.append(f"{dropped:,} examples left out")
        if self.border is not None:
            merged = self.merged_ids
            more = " ..." if len(merged) > 10 else ""
            ids = f", {BORDERS[self.border]}: ids {merged[:10].tolist()}{more}" * (len(merged) > 0)
            parts.append(f"{len(merged):,} borders of prompt and response within a token{ids}")
        if self.weight is not None:
            used = np.delete(self.weight, self.dropped_ids)
            parts.append(f"own weights from {used.min():g} to {used.max():g}")
        if self.token_weight is not None:
            values = self.token_weight.values
            parts.append(f"own token weights from {values.min():g} to {values.max():g}")
        return "; ".join(parts)


def check_vocabulary(
    data: TokenSource | int, vocab_size: int, used_N: np.ndarray | None = None
) -> None:
    """Raises DataError if a token is not in the model's vocabulary; the message has the ids.

    Args:
      data: the source, or the largest token id.
      vocab_size: of the model.
      used_N: bool, the examples to check; default: all.

    Example:
      >>> check_vocabulary(7, vocab_size=8)
      >>> check_vocabulary(8, vocab_size=8)
      Traceback (most recent call last):
      easy_jax.data.sources.DataError: the data has token id 8, the model a vocabulary of 8: \
tokenizer and model do not belong together
    """
    examples = ""
    if isinstance(data, TokenSource):
        bad = np.flatnonzero(data.tokens >= vocab_size)
        id_of = np.searchsorted(data.offsets, bad, side="right") - 1
        if used_N is not None:
            bad, id_of = bad[used_N[id_of]], id_of[used_N[id_of]]
        if not bad.size:
            return
        ids = np.unique(id_of)
        more = " ..." if ids.size > 10 else ""
        examples = f" (in {ids.size} examples, ids {ids[:10].tolist()}{more})"
        data = int(data.tokens[bad].max())
    if data >= vocab_size:
        raise DataError(
            f"the data has token id {data}{examples}, the model a vocabulary of {vocab_size}: "
            "tokenizer and model do not belong together"
        )


def _integers(name: str, values: Sequence[int] | np.ndarray, dtype: type) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise DataError(f"{name} has dtype {array.dtype}, shape {array.shape}; use 1-D integers")
    if array.size and not 0 <= array.min() <= array.max() <= np.iinfo(dtype).max:
        raise DataError(f"{name} goes from {array.min()} to {array.max()}; use {dtype.__name__}")
    return array.astype(dtype, copy=False)


def _weights(values: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    array = np.asarray(values, np.float32)
    if array.shape != (size,):
        raise DataError(f"weight has shape {array.shape}; it must have one value an example")
    _refuse(~np.isfinite(array) | (array < 0), "the weight is negative or not finite")
    small_N = (np.asarray(values) > 0) & (array < np.finfo(np.float32).tiny)
    _refuse(small_N, "the weight is not 0, but too small for float32")
    return array


def _refuse(bad_N: np.ndarray, why: str) -> None:
    """Raises DataError with the ids of the bad examples, if there are any."""
    ids = np.flatnonzero(bad_N)
    if ids.size:
        more = " ..." if ids.size > 10 else ""
        raise DataError(f"{ids.size} examples, ids {ids[:10].tolist()}{more}: {why}")
