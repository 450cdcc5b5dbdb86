"""Packing: several examples in one row of fixed length, separated by segment ids.

Grain's first-fit algorithm decides from the lengths which examples share a row, before anything
is read. So the number of rows is known, rows can be read in any order, and the position in the
data is one integer, as for unpacked sources.

In addition to the loader's fields, a batch has R rows of T tokens with at most S examples each:
  `tokens`       int32 [R, T]   an example without its last token; 0 in the padding
  `targets`      int32 [R, T]   the token that follows; -1 where it is no target
  `segment_ids`  int32 [R, T]   1, 2, ... in a row; 0 in the padding
  `positions`    int32 [R, T]   place within the example
  `example_id`, `mask`, `weight`   [R, S]   of the examples in a row's order
  `token_weight`, `frozen_nll`  float32 [R, T]  values of the target tokens, where they are given
"""

import dataclasses
from collections.abc import Mapping

import grain
import numpy as np

from easy_jax.data import ragged
from easy_jax.data.ragged import Ragged
from easy_jax.data.sources import DataError
from easy_jax.data.token_source import TokenSource

NO_TARGET = -1
_BINS = 64  # rows that are open at a time: 97 % full at MetaMathQA's lengths


@dataclasses.dataclass(frozen=True)
class PackedSource:
    """Tokenised examples that the loaders pack into rows; a batch size counts rows.

    Attributes:
      examples: the examples; their position is their id.
      row_length: tokens in a row. An example needs one less than it has tokens, because the
        last one is never an input.
      max_segments: maximal number of examples in a row; 0: as many as fit, 1: no packing.

    Raises:
      DataError: an example is longer than a row; the message has its id.

    Example:
      >>> examples = TokenSource(np.arange(10), [0, 4, 6, 10], [1, 1, 1])
      >>> packed = PackedSource(examples, row_length=4)
      >>> [row.tolist() for row in packed.rows(np.arange(3))]
      [[0, 1], [2]]
    """

    examples: TokenSource
    row_length: int
    max_segments: int = 0

    def __post_init__(self) -> None:
        if self.row_length < 1 or self.max_segments < 0:
            raise DataError(
                f"row_length is {self.row_length} and max_segments {self.max_segments}; they must "
                "be positive (max_segments may be 0, for as many as fit)"
            )
        long = np.flatnonzero(self.examples.lengths - 1 > self.row_length)
        if long.size:
            raise DataError(
                f"{long.size} examples do not fit into a row of {self.row_length} tokens, ids "
                f"{long[:10].tolist()}; raise row_length or lower max_length"
            )

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def dropped_ids(self) -> np.ndarray:
        """The examples' `dropped_ids` (see `Source`)."""
        return self.examples.dropped_ids

    def fingerprint(self) -> str:
        """Returns the examples' fingerprint, because losses do not depend on the packing."""
        return self.examples.fingerprint()

    def rows(self, ids: np.ndarray) -> list[np.ndarray]:
        """Returns the ids of each row, by first fit in the given order."""
        if self.max_segments == 1:
            return list(ids[:, None])
        lengths = self.examples.lengths - 1
        blank = np.zeros(self.row_length, np.int8)
        dataset: grain.IterDataset = (
            grain.MapDataset.source(ids)
            .map(lambda i: {"row": blank[: lengths[i]], "id": i})
            .to_iter_dataset(grain.ReadOptions(num_threads=0))
        )
        packed = grain.experimental.FirstFitPackIterDataset(
            dataset,
            length_struct={"row": self.row_length},
            num_packing_bins=_BINS,
            shuffle_bins=False,
            meta_features=["id"],
            max_sequences_per_bin=self.max_segments or None,
        )
        return [np.array(row["id"], np.int64) for row in packed]


class PackedRows:
    """Reader of rows of examples into arrays of fixed shape.

    Args:
      source: the examples.
      segments: S, for every batch.
      token_values: for each of the batch's fields `token_weight` and `frozen_nll`, if given, a
        value per target token of every example.
    """

    def __init__(self, source: PackedSource, segments: int, token_values: Mapping[str, Ragged]):
        self._source = source
        self._segments = segments
        self._token_values = token_values
        for name, values in token_values.items():
            check_token_weights(values, source.examples, name)

    def read(self, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a batch of these rows; an empty row is padding."""
        examples = self._source.examples
        shape = (len(rows), self._source.row_length)
        batch: dict[str, np.ndarray] = {
            "tokens": np.zeros(shape, np.int32),
            "targets": np.full(shape, NO_TARGET, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "example_id": np.full((len(rows), self._segments), -1, np.int64),
        }
        for name in self._token_values:
            batch[name] = np.zeros(shape, np.float32)
        for r, ids in enumerate(rows):
            batch["example_id"][r, : len(ids)] = ids
            start = 0
            for segment, i in enumerate(ids, 1):
                tokens = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
                stop = start + len(tokens) - 1
                first = start + examples.target_start[i] - 1  # sees the token before the target
                batch["tokens"][r, start:stop] = tokens[:-1]
                batch["targets"][r, first:stop] = tokens[examples.target_start[i] :]
                batch["segment_ids"][r, start:stop] = segment
                batch["positions"][r, start:stop] = np.arange(stop - start)
                for name, values in self._token_values.items():
                    batch[name][r, first:stop] = values[i]
                start = stop
        return batch


def split_tokens(batch: Mapping[str, np.ndarray], value_RT: np.ndarray) -> list[np.ndarray]:
    """Returns the values at the target tokens, one array per example, in the order of `mask`."""
    is_target_RT = batch["targets"] != NO_TARGET
    parts = []
    for r, mask_S in enumerate(batch["mask"]):
        values = value_RT[r][is_target_RT[r]]
        segments = batch["segment_ids"][r][is_target_RT[r]]
        ends = np.searchsorted(segments, np.arange(1, int(mask_S.sum()) + 1), side="right")
        parts += np.split(values, ends)[:-1]
    return parts


def check_token_weights(
    token_weight: Ragged, examples: TokenSource, name: str = "token_weight"
) -> None:
    """Raises DataError unless every target token has a value that is finite and at least 0.

    An example without any values was dropped while scoring and is never read.
    """
    what = {"token_weight": "token weights", "frozen_nll": "frozen losses"}[name]
    has_none_N = np.diff(token_weight.offsets) == 0
    ragged.check(token_weight, examples.num_targets, has_none_N, what)
