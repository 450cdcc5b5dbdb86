"""Loss tables: the frozen model's loss on every example, stored as Parquet and JSON.

A loss table is a directory with
  part-PPPPP-KKKKK.parquet   example_id int64, loss float32, count float32; part K of process P;
                             for text, on request, token_losses list<float32>
  dropped-PPPPP.json         ids of examples that process P dropped
  metadata.json              fingerprints of model, data and loss function, number of examples;
                             once complete, quantiles and the fingerprint of all losses
Parts are written atomically, so an interrupted table is resumed at its missing rows. The metadata
are written first, so that every part's model and data are known. Each file has a checksum of its
content; that of a part is in the schema's metadata.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from easy_jax.core import weightings
from easy_jax.data import DataWarning, Ragged
from easy_jax.io import files, sealed
from easy_jax.io import fingerprint as fingerprints
from easy_jax.train.loss_parts import LossTableError, Rows, iter_rows, iter_token_losses, seen_ids

FORMAT_VERSION = 2  # 2: checksums, the loss function's code, the model's structure
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclasses.dataclass(frozen=True)
class LossTable:
    """A complete loss table on disk, opened with `LossTable.open(directory)`.

    Attributes:
      directory: the table's directory.
      metadata: the content of `metadata.json`.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import easy_jax as ej
      >>> source = ej.ArraySource({"x": np.ones((3, 1), "f"), "y": np.float32([[1], [2], [3]])})
      >>> def loss_fn(model, batch):
      ...     return ej.squared_error(model(batch["x"]), batch["y"])
      >>> folder = tempfile.mkdtemp()
      >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
      >>> _ = ej.score(model, source, folder, loss_fn=loss_fn, batch_size=8)
      >>> table = LossTable.open(folder)
      >>> table.num_examples, bool(np.isclose(np.median(table.flow_weights()), np.exp(-1)))
      (3, True)
    """

    directory: Path
    metadata: dict[str, Any]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "LossTable":
        """Opens a complete table.

        Raises:
          LossTableError: there is no table, it is incomplete, or rows are missing or ambiguous.
        """
        directory = files.path(directory)
        metadata = read_metadata(directory)
        if metadata is None:
            raise LossTableError(f"no loss table in {directory}: there is no metadata.json")
        if not metadata["complete"]:
            raise LossTableError(
                f"the loss table in {directory} is incomplete; run the scoring again, it "
                "continues where it stopped"
            )
        table = cls(directory, metadata)
        table.check_rows()
        return table

    def check_rows(self) -> None:
        """Raises LossTableError unless every example that was not dropped has one row, and no
        loss was changed after scoring."""
        self.check_ids()
        if self.fingerprint() != self.metadata["losses"]:
            raise LossTableError(
                f"the losses in {self.directory} were changed after they were scored: the "
                f"fingerprint in metadata.json is of others; {_fix(self.directory)}"
            )

    def check_ids(self) -> None:
        """Raises LossTableError unless every example that was not dropped has one row."""
        seen_N = seen_ids(self.directory, self.num_examples)
        seen_N[self.metadata["dropped_ids"]] = True
        if not seen_N.all():
            missing = np.flatnonzero(~seen_N)
            raise LossTableError(
                f"the loss table in {self.directory} has no row for {missing.size} of "
                f"{seen_N.size} examples, ids {missing[:10].tolist()}; run the scoring again, it "
                "adds them"
            )

    @property
    def num_examples(self) -> int:
        """Number of examples of the data set, including dropped ones."""
        return self.metadata["num_examples"]

    @property
    def temperature(self) -> float:
        """Exact median of all losses, without dropped examples."""
        return self.metadata["median"]

    @property
    def token_temperature(self) -> float:
        """Exact median of the losses of all target tokens.

        Raises:
          LossTableError: the table has no token losses.
        """
        if "token_median" not in self.metadata:
            raise LossTableError(
                f"the loss table in {self.directory} has no token losses; score again, with "
                "token_losses=True"
            )
        return self.metadata["token_median"]

    def check(self, **expected: str) -> None:
        """Checks that the table is of the expected model, data or loss function.

        Args:
          **expected: entries of the metadata, such as `model`, `data`, `loss`.

        Raises:
          LossTableError: an entry differs; the message names all of these.
        """
        check_metadata(self.directory, self.metadata, expected)

    def rows(self) -> Iterator[Rows]:
        """Streams `(example_id, loss, count)` arrays, a row group at a time."""
        return iter_rows(self.directory)

    def loss_N(self) -> np.ndarray:
        """Returns the float32 losses by example id; NaN for dropped examples."""
        loss_N = np.full(self.num_examples, np.nan, np.float32)
        for ids, loss, _ in self.rows():
            loss_N[ids] = loss
        return loss_N

    def flow_weights(self, tau: float | None = None) -> np.ndarray:
        """Returns FLOW's weights by example id, float32 [num_examples]; NaN for dropped examples.

        Args:
          tau: the temperature; default: the median, `self.temperature`.

        Raises:
          LossTableError: the temperature is not positive and finite.
        """
        tau = self._positive(self.temperature if tau is None else tau)
        weight_N = np.full(self.num_examples, np.nan, np.float32)
        for ids, loss, _ in self.rows():
            weight_N[ids] = np.asarray(weightings.flow_weights(loss, _float32(tau)))
        zero = np.flatnonzero(weight_N == 0)
        if zero.size:
            some = f"{zero[:10].tolist()}{' ...' if zero.size > 10 else ''}"
            self._warn(
                f"{zero.size} of {self.num_examples} weights are 0: these losses are more than 87 "
                f"times the temperature {tau:.4g}. Nothing is learnt from example ids {some}"
            )
        if len(weight_N) > 1 and np.nanmin(weight_N) == np.nanmax(weight_N):
            self._warn(
                f"all weights are {np.nanmax(weight_N):.4g}, because all losses are equal: "
                "training is plain, with a smaller step"
            )
        return weight_N

    def token_losses(self) -> Ragged:
        """Returns the target tokens' float32 losses by example id; empty for dropped examples."""
        self.token_temperature  # noqa: B018, raises where there are none
        parts = [np.zeros(0, np.float32)] * self.num_examples
        for ids, losses in iter_token_losses(self.directory):
            for i, loss in zip(ids, losses, strict=True):
                parts[i] = loss
        offsets = np.cumsum([0, *map(len, parts)])
        return Ragged(np.concatenate(parts), offsets)

    def flow_token_weights(self, tau: float | None = None) -> Ragged:
        """Returns token-wise FLOW's weights by example id; empty for dropped examples.

        Args:
          tau: the temperature; default: the median over tokens, `self.token_temperature`.

        Raises:
          LossTableError: the table has no token losses, or the temperature is not positive and
            finite.
        """
        tau = self._positive(self.token_temperature if tau is None else tau)
        losses = self.token_losses()
        weight = np.asarray(weightings.flow_weights(losses.values, _float32(tau)))
        filled = losses.offsets[:-1][np.diff(losses.offsets) > 0]
        lost = np.maximum.reduceat(weight, filled) == 0  # examples without any weight
        if lost.any():
            ids = np.flatnonzero(np.diff(losses.offsets) > 0)[lost]
            self._warn(
                f"all token weights of {ids.size} of {self.num_examples} examples are 0: nothing "
                f"is learnt from example ids {ids[:10].tolist()}{' ...' if ids.size > 10 else ''}"
            )
        return Ragged(weight, losses.offsets)

    def _warn(self, message: str) -> None:
        warnings.warn(f"{self.directory}: {message}", DataWarning, stacklevel=3)

    def _positive(self, tau: float) -> float:
        if not 0 < tau < np.inf:
            raise LossTableError(
                f"the temperature of the loss table in {self.directory} is {tau}; it must be "
                "positive and finite. At least half of the losses are zero if the median is: has "
                "the model been trained on these examples?"
            )
        return tau

    def fingerprint(self) -> str:
        """Returns a hash of the losses by id, independent of the division into parts."""
        return fingerprints.of_arrays({"loss": self.loss_N()})


def _float32(tau: float) -> float:
    """Rounds the temperature to float32, unless that would give 0, a subnormal or infinity."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(tau))
    return rounded if np.finfo(np.float32).tiny <= rounded < np.inf else tau


def read_metadata(directory: Path) -> dict[str, Any] | None:
    """Returns the metadata of a table, complete or incomplete; None if there is no table.

    Raises:
      LossTableError: the metadata cannot be read, or there are rows without metadata.
    """
    path = directory / "metadata.json"
    if not path.exists():
        rows = [*directory.glob("part-*.parquet"), *directory.glob("dropped-*.json")]
        if rows:
            raise LossTableError(
                f"{min(rows)} is there, but no metadata.json, which says of what model and data it "
                f"is; delete {directory} and score again"
            )
        return None
    found = files.read_json(path, LossTableError, _fix(directory))
    if found.get("format_version") != FORMAT_VERSION:
        raise LossTableError(
            f"{path} has format version {str(found.get('format_version'))[:20]}, of another "
            f"version of easy_jax; this one reads {FORMAT_VERSION}: {_fix(directory)}"
        )
    return sealed.unseal(found, path, LossTableError, _fix(directory))


def _fix(directory: Path) -> str:
    return f"delete {directory} and score again"


def write_metadata(directory: Path, metadata: dict[str, Any]) -> None:
    """Writes metadata.json atomically, with a checksum."""
    sealed.write(directory / "metadata.json", metadata)


def write_dropped(directory: Path, process: int, ids: set[int]) -> None:
    """Writes the ids of the examples that a process has dropped."""
    sealed.write(directory / f"dropped-{process:05d}.json", {"dropped_ids": sorted(ids)})


def read_dropped(directory: Path) -> set[int]:
    """Returns the ids of the examples that any process has dropped.

    Raises:
      LossTableError: a file cannot be read, or was changed.
    """
    found: set[int] = set()
    for path in sorted(directory.glob("dropped-*.json")):
        fix = f"delete it and score again: {directory} keeps its rows"
        found |= set(sealed.read(path, LossTableError, fix)["dropped_ids"])
    return found


def check_metadata(directory: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises LossTableError naming every expected entry that differs."""
    wrong = [
        f"{key} is {found.get(key)!r} there and {value!r} here"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if wrong:
        raise LossTableError(
            f"the loss table in {directory} was computed with different inputs: "
            f"{'; '.join(wrong)}. Score again into another directory, or delete this one "
            "(in Python: overwrite=True)"
        )


def clear(directory: Path) -> None:
    """Deletes the table in a directory, complete or incomplete, and no other files."""
    for pattern in ("part-*.parquet", "dropped-*.json", "metadata.json"):  # the metadata last
        for path in directory.glob(pattern):
            path.unlink()


def summarise(directory: Path, token_losses: bool = False) -> dict[str, Any]:
    """Computes exact quantiles and medians of the losses in streaming passes over the parts."""

    def losses() -> Iterator[np.ndarray]:
        for _, loss, _ in iter_rows(directory):
            yield loss

    def tokens() -> Iterator[np.ndarray]:
        for _, lists in iter_token_losses(directory):
            yield np.concatenate(lists)

    size = sum(len(loss) for loss in losses())
    if size == 0:
        raise LossTableError(f"the loss table in {directory} has no rows")
    ranks = [round(q * (size - 1)) for q in QUANTILES]
    values = order_statistics(losses, ranks)
    quantiles = dict(zip(map(str, QUANTILES), values, strict=True))
    summary = {"num_rows": size, "median": _median(losses), "quantiles": quantiles}
    if token_losses:
        summary["num_tokens"] = sum(len(loss) for loss in tokens())
        summary["token_median"] = _median(tokens)
    return summary


def _median(chunks: Callable[[], Iterator[np.ndarray]]) -> float:
    size = sum(len(chunk) for chunk in chunks())
    low, high = order_statistics(chunks, [(size - 1) // 2, size // 2])
    return float(np.float32((low + high) / 2))  # float64 does not overflow


def order_statistics(
    chunks: Callable[[], Iterator[np.ndarray]], ranks: Sequence[int]
) -> list[float]:
    """Computes exact order statistics of a stream of non-negative float32 values.

    The bit patterns of non-negative floats sort like the floats, so a histogram of the
    upper 16 bits finds the bucket of a rank and one of the lower 16 bits the value. Memory
    is constant, and histograms can be summed over parts, processes and hosts.

    Args:
      chunks: function that is called twice; streams float32 arrays without NaN.
      ranks: zero-based ranks.

    Returns:
      The values at these ranks.

    Example:
      >>> order_statistics(lambda: iter([np.float32([3, 1]), np.float32([2])]), [0, 1])
      [1.0, 2.0]
    """
    buckets = 1 << 16
    upper = np.zeros(buckets, np.int64)
    for chunk in chunks():
        upper += np.bincount(_bits(chunk) >> 16, minlength=buckets)
    ends = np.cumsum(upper)
    places = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    lower = {place: np.zeros(buckets, np.int64) for place in places}
    for chunk in chunks():
        bits = _bits(chunk)
        for place, histogram in lower.items():
            histogram += np.bincount(bits[bits >> 16 == place] & 0xFFFF, minlength=buckets)
    values = []
    for rank, place in zip(ranks, places, strict=True):
        within = rank - (ends[place] - upper[place])
        low = int(np.searchsorted(np.cumsum(lower[place]), within, side="right"))
        values.append(float(np.uint32(place << 16 | low).view(np.float32)))
    return values


def _bits(chunk: np.ndarray) -> np.ndarray:
    # Adding 0.0 turns -0.0, whose bits sort last, into 0.0.
    return (np.ascontiguousarray(chunk, np.float32) + np.float32(0.0)).view(np.uint32)
