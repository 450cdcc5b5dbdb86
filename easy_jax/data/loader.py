"""Grain loaders: every example once for scoring, shuffled epochs for training.

Only positions are ordered: they are shuffled, repeated and cut into *global* batches, and each
process takes its rows of a batch. Records are read after this, in threads of this process or in
worker processes (`Reading`). So the global batch at a step does not depend on the number of
processes, threads or workers, shuffling is almost free, and the state of an iterator is one
integer.

Every batch has the fields of the records and
  `example_id`  int64 [b]    position in the source; -1 for padding
  `mask`        bool [b]     False for padding (a copy of a record of the batch)
  `weight`      float32 [b]  training only
For a packed source (`easy_jax.data.packing`), the same is true with rows instead of examples:
a batch size counts rows, and these three fields are [b, S].
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np

from easy_jax.data.checks import check_batch, check_own_weight, checked_weights, stack
from easy_jax.data.packing import PackedRows, PackedSource, Ragged, check_token_weights
from easy_jax.data.ragged import product
from easy_jax.data.reading import Reading, iterate
from easy_jax.data.sources import DataError, Source
from easy_jax.parallel import sharding

Batch = dict[str, np.ndarray]
AnySource = Source | PackedSource
PADDING_ID = -1


class Loader:
    """Batches of one process, in an order that its arguments determine.

    `iter` returns a Grain iterator, whose position can be saved and restored; close it if it is
    not used to the end.
    `steps` is the number of batches, the same in every process.
    """

    def __init__(
        self,
        dataset: grain.MapDataset[Batch],
        reading: Reading,
        order: np.ndarray | list[np.ndarray] | None = None,
    ):
        self._dataset = dataset
        self._reading = reading
        self._order = order

    @property
    def steps(self) -> int:
        return len(self._dataset)

    def ids_in(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Returns the ids of all examples in these rows of scoring's global batches, sorted."""
        assert self._order is not None
        order = self._order
        chosen = np.resize(np.isin(np.arange(batch_size), rows), len(order))
        if isinstance(order, np.ndarray):
            return np.sort(order[chosen])
        mine = [order[i] for i in np.flatnonzero(chosen)]
        return np.sort(np.concatenate(mine)) if mine else np.zeros(0, np.int64)

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return iterate(self._dataset, self._reading)


def scoring_loader(
    source: AnySource,
    batch_size: int,
    *,
    ids: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    reading: Reading | None = None,
) -> Loader:
    """Loads every example exactly once, in order of id; the last batch is padded.

    Args:
      source: the data.
      batch_size: global, over all processes.
      ids: the examples to read; default: all but the source's `dropped_ids`.
      rows: the rows of every global batch that this process reads; default: those its devices
        need on a mesh with all devices on the data axis (`sharding.process_rows`).
      reading: threads, read-ahead and worker processes; default: the source's `reading`.

    Raises:
      DataError: an empty source, ids out of range or given twice.
      ConfigError: without `rows`, a batch size that cannot be split evenly over the devices.

    Example:
      >>> from easy_jax.data import ArraySource
      >>> loader = scoring_loader(ArraySource({"x": np.arange(3.0)}), batch_size=2)
      >>> [batch["mask"].tolist() for batch in loader]
      [[True, True], [True, False]]
    """
    ids = _checked_ids(source, ids)
    share = _share(batch_size, rows)
    reading = _reading(source) if reading is None else reading
    if isinstance(source, PackedSource):
        packed = source.rows(ids)
        return Loader(_packed(source, packed, batch_size, share), reading, packed)
    read = _Reader(functools.partial(read_records, source), batch_size, share)
    starts = grain.MapDataset.range(0, len(ids), batch_size)
    dataset = starts.map(lambda start: read(ids[start : start + batch_size]))
    return Loader(dataset, reading, ids)


def training_loader(
    source: AnySource,
    batch_size: int,
    *,
    epochs: int,
    seed: int,
    weight_N: np.ndarray | None = None,
    token_weight: Ragged | None = None,
    frozen_nll: Ragged | np.ndarray | None = None,
    rows: np.ndarray | None = None,
    reading: Reading | None = None,
) -> Loader:
    """Loads shuffled epochs, each in its own order, with the weights joined by id.

    Every example except the source's `dropped_ids` is used exactly `epochs` times. A batch may
    contain the end of one epoch and the beginning of the next; only the very last one is padded.

    For a packed source, the rows of all epochs are computed before the first batch, because their
    number depends on the order of each epoch, and the learning rate's schedule needs the number of
    steps. This takes about 90 us and 40 bytes (with `max_segments=1` 0.1 us and 130 bytes) per
    example and epoch.

    Args:
      source: the data; a field `weight`, if it has one, is multiplied into `weight_N`. If it
        has random transforms (`training_batch`), these are read.
      batch_size: global, over all processes.
      epochs: passes over the data.
      seed: of the order and the transforms; equal seeds give equal batches on any number of
        processes.
      weight_N: float weights by example id, of length `len(source)`; default: 1. An entry
        that is NaN is an example dropped while scoring: it is left out of training.
      token_weight: weights of the target tokens, for packed sources only; multiplied into the
        source's own. An example that has none was dropped while scoring, and is left out.
      frozen_nll: the frozen model's losses, [N] by example id, or of the target tokens for packed
        sources; becomes a field of the batches.
      rows, reading: as in `scoring_loader`.

    Raises:
      DataError: an empty source; weights of another length, negative or infinite, or all 0.
      ConfigError: without `rows`, a batch size that cannot be split evenly over the devices.

    Example:
      >>> from easy_jax.data import ArraySource
      >>> loader = training_loader(ArraySource({"x": np.arange(4.0)}), 2, epochs=3, seed=0)
      >>> loader.steps
      6
    """
    ids = None
    if isinstance(source, PackedSource) and source.examples.token_weight is not None:
        own = source.examples.token_weight
        token_weight = own if token_weight is None else product(own, token_weight)
    if token_weight is not None:
        if not isinstance(source, PackedSource):
            raise DataError("token weights are for packed text; this source has no tokens")
        check_token_weights(token_weight, source.examples)
        given_N = np.ones(len(source)) if weight_N is None else np.asarray(weight_N)
        if given_N.shape == (len(source),):  # dropped while scoring: it has no token weights
            weight_N = np.where(np.diff(token_weight.offsets) > 0, given_N, np.nan)
    if isinstance(source, PackedSource) and source.examples.weight is not None:
        given_N = np.ones(len(source)) if weight_N is None else weight_N
        weight_N = checked_weights(given_N, len(source)) * source.examples.weight
    if weight_N is not None:
        weight_N = checked_weights(weight_N, len(source))
        ids = np.flatnonzero(~np.isnan(weight_N))
        if ids.size == 0:
            raise DataError("no example is left to train on: every weight is missing")
        if not weight_N[ids].any():
            raise DataError(f"there is nothing to train on: all {ids.size} weights are 0")
    if token_weight is not None:
        assert weight_N is not None  # set above
        of_example = np.repeat(np.nan_to_num(weight_N), np.diff(token_weight.offsets))
        if not (token_weight.values * of_example).any():
            raise DataError(
                "there is nothing to train on: all token weights, times their example's, are 0"
            )
    ids = _checked_ids(source, ids)
    order = _ShuffledEpochs(ids, seed, epochs)
    weight_N = np.ones(len(source), np.float32) if weight_N is None else weight_N
    share = _share(batch_size, rows)
    reading = _reading(source) if reading is None else reading
    if isinstance(source, PackedSource):
        # Not lazily, because their number is the number of steps.
        packed = [row for epoch in range(epochs) for row in source.rows(order.epoch(epoch))]
        given = {"token_weight": token_weight, "frozen_nll": frozen_nll}
        token_values = {name: each for name, each in given.items() if isinstance(each, Ragged)}
        dataset = _packed(source, packed, batch_size, share, weight_N, token_values)
        return Loader(dataset, reading)
    records = functools.partial(_read_transformed, source, seed)
    frozen_N = None if frozen_nll is None else np.asarray(frozen_nll, np.float32)
    read = _Reader(records, batch_size, share, weight_N, frozen_N)
    starts = grain.MapDataset.range(0, len(ids) * epochs, batch_size)
    dataset = starts.map(lambda start: read(*order.slice(start, start + batch_size)))
    return Loader(dataset, reading)


class _ShuffledEpochs:
    """Ids in the order of training: one permutation per epoch, a function of seed and epoch.

    The permutation is in memory (8 bytes per example, like the ids). Grain's `shuffle` is not used:
    it takes up to 60 us per example, a tenth of a small step, because it walks a 16-bit cipher
    until it finds an index in range.
    """

    def __init__(self, ids: np.ndarray, seed: int, epochs: int):
        self._ids = ids
        self._seed = seed
        self._epochs = epochs
        # Two epochs are in use at a time: reader threads run ahead into the next one.
        self.epoch = functools.lru_cache(maxsize=2)(self._permuted)

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process has its own cache
        return _ShuffledEpochs, (self._ids, self._seed, self._epochs)

    def _permuted(self, epoch: int) -> np.ndarray:
        # Sorted raw bits, because NumPy may change `permutation` between versions, but not these.
        bits = np.random.Philox([self._seed, epoch]).random_raw(len(self._ids))
        return self._ids[np.argsort(bits, kind="stable")]

    def slice(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and epochs at positions start to stop of the concatenated epochs, cut at
        the end of the last one."""
        size = len(self._ids)
        stop = min(stop, size * self._epochs)
        epochs = range(start // size, (stop - 1) // size + 1)
        ids = [self.epoch(e)[max(start - e * size, 0) : stop - e * size] for e in epochs]
        return np.concatenate(ids), np.arange(start, stop) // size


def _reading(source: AnySource) -> Reading:
    """Returns the source's own `Reading`, or the default."""
    reading: Reading = getattr(source, "reading", Reading())
    return reading


def _share(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """Returns the rows of a global batch that this process reads."""
    if rows is not None:
        return np.asarray(rows)
    if jax.process_count() == 1:
        return np.arange(batch_size)
    return sharding.process_rows(batch_size, sharding.make_mesh())


def _packed(
    source: PackedSource,
    rows: list[np.ndarray],
    batch_size: int,
    share: np.ndarray,
    weight_N: np.ndarray | None = None,
    token_values: Mapping[str, Ragged] | None = None,
) -> grain.MapDataset[Batch]:
    """Reads this process's part of global batches of rows, padded with empty rows and masked."""
    reader = PackedRows(source, max(map(len, rows)), token_values or {})
    nothing = np.zeros(0, np.int64)

    def read(start: int) -> Batch:
        part = rows[start : start + batch_size]
        part = [*part, *[nothing] * (batch_size - len(part))]
        batch = reader.read([part[row] for row in share])
        mask_rs = batch["mask"] = batch["example_id"] != PADDING_ID
        if weight_N is not None:
            batch["weight"] = np.where(mask_rs, weight_N[batch["example_id"]], 0.0)
            batch["weight"] = batch["weight"].astype(np.float32)
        return batch

    return grain.MapDataset.range(0, len(rows), batch_size).map(read)


class _Reader:
    """Map from a global batch of ids to this process's rows, stacked, padded and checked.

    Args:
      records: positions, and epochs when training, of equal length -> their records, stacked.
      batch_size, share: of the global batch; the rows to read.
      weight_N, frozen_N: weights and the frozen model's losses by id, when training.
    """

    def __init__(
        self,
        records: Callable[..., Batch],
        batch_size: int,
        share: np.ndarray,
        weight_N: np.ndarray | None = None,
        frozen_N: np.ndarray | None = None,
    ):
        self._records = records
        self._batch_size = batch_size
        self._rows = share
        self._weight_N = weight_N
        self._frozen_N = frozen_N

    def __call__(self, ids: np.ndarray, *epochs: np.ndarray) -> Batch:
        padding = np.full(self._batch_size - len(ids), PADDING_ID, np.int64)
        id_b = np.concatenate([ids.astype(np.int64), padding])[self._rows]
        mask_b = id_b != PADDING_ID
        rows = self._rows[mask_b] if mask_b.any() else np.zeros(1, np.int64)
        positions = ids[rows].tolist()
        batch = self._records(positions, *(epoch[rows].tolist() for epoch in epochs))
        check_batch(batch, positions)
        own_weight_b = batch.pop("weight", None)
        if self._weight_N is not None:
            weight_b = self._weight_N[positions]
            if own_weight_b is not None:
                weight_b = weight_b * check_own_weight(own_weight_b, positions)
            batch["weight"] = weight_b.astype(np.float32)
        if self._frozen_N is not None:
            batch["frozen_nll"] = self._frozen_N[positions]
        if not mask_b.all():  # every example is read once; padding copies the first
            row_b = np.where(mask_b, np.cumsum(mask_b) - 1, 0)
            batch = {name: array[row_b] for name, array in batch.items()}
            if self._weight_N is not None:
                batch["weight"] = np.where(mask_b, batch["weight"], np.float32(0.0))
        return {**batch, "example_id": id_b, "mask": mask_b}


def read_records(source: Source, positions: list[int]) -> Batch:
    """Returns the records at these positions, stacked."""
    if hasattr(source, "batch"):
        return dict(source.batch(positions))
    if hasattr(source, "__getitems__"):
        return stack(source.__getitems__(positions), positions)
    return stack([source[position] for position in positions], positions)


def _read_transformed(source: Source, seed: int, positions: list[int], epochs: list[int]) -> Batch:
    """Returns the records at these positions, with the transforms of these epochs if any."""
    if hasattr(source, "training_batch"):
        return dict(source.training_batch(positions, epochs, seed))
    return read_records(source, positions)


def present_ids(source: AnySource) -> np.ndarray:
    """Returns the ids of all examples except `dropped_ids`, in order, int64.

    Raises:
      DataError: there are none.
    """
    ids = np.arange(len(source), dtype=np.int64)
    ids = np.delete(ids, getattr(source, "dropped_ids", np.zeros(0, np.int64)))
    if not ids.size:
        raise DataError("the data set is empty: it has no examples")
    return ids


def _checked_ids(source: AnySource, ids: np.ndarray | None) -> np.ndarray:
    size = len(source)
    present = present_ids(source)
    if ids is None:
        return present
    ids = np.asarray(ids, np.int64)
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.size:
        raise DataError(f"example ids {outside[:10].tolist()} are not in [0, {size})")
    unique, counts = np.unique(ids, return_counts=True)
    if unique.size != ids.size:
        raise DataError(f"duplicate example ids: {unique[counts > 1][:10].tolist()}")
    return ids[np.isin(ids, present)]
