"""Reading ahead for a loader, in threads of this process or in worker processes."""

import dataclasses
from typing import Any

import grain
from absl import flags


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """Settings for how a loader reads; its batches do not depend on them.

    Attributes:
      threads: reader threads, of each worker if there are workers; each makes a complete batch.
      prefetch: batches read ahead, by each worker if there are workers; with fewer than
        `threads`, some threads are idle.
      workers: processes that read instead of this one, for sources that hold Python's lock.
        They start as fresh interpreters, so a script that uses them needs the guard
        `if __name__ == "__main__"`.

    Example:
      >>> Reading(threads=8).workers
      0
    """

    threads: int = 2
    prefetch: int = 4
    workers: int = 0


def iterate(dataset: grain.MapDataset[Any], reading: Reading) -> grain.DatasetIterator[Any]:
    """Returns an iterator over the elements in order; its state is their number so far.

    Example:
      >>> numbers = iterate(grain.MapDataset.range(10), Reading(threads=1, prefetch=2))
      >>> next(numbers), next(numbers), numbers.get_state()
      (0, 1, {'next_index': 2})
    """
    if reading.workers == 0:
        return iter(dataset.to_iter_dataset(_options(reading)))
    return _WorkerIterator(dataset, reading)


class _WorkerIterator(grain.DatasetIterator[Any]):
    """Iterator over elements that worker processes read, with the state of one without workers.

    Grain's own iterator has a state per worker, so a run could not continue with another number
    of workers.
    """

    def __init__(self, dataset: grain.MapDataset[Any], reading: Reading):
        super().__init__()
        self._dataset = dataset
        self._reading = reading
        self._position = 0
        self._elements: grain.DatasetIterator[Any] | None = None

    def __next__(self) -> Any:
        left = len(self._dataset) - self._position
        if left <= 0:
            self.close()
            raise StopIteration
        if self._elements is None:  # not earlier, because the position may be set first
            if not flags.FLAGS.is_parsed():  # Grain has flags; scripts without absl parse none
                flags.FLAGS.mark_as_parsed()
            rest = self._dataset[self._position :].to_iter_dataset(_options(self._reading))
            workers = grain.MultiprocessingOptions(num_workers=min(self._reading.workers, left))
            self._elements = iter(rest.mp_prefetch(workers))
        element = next(self._elements)
        self._position += 1
        return element

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._position = state["next_index"]

    def close(self) -> None:
        if self._elements is not None:
            self._elements.close()
            self._elements = None


def _options(reading: Reading) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=reading.prefetch)
