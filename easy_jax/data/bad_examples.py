"""Collection of unusable examples, which are reported in one message or left out."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from easy_jax.data.sources import DataError, DataWarning

_SHOWN = 20
_OPTIONS = {
    "input": "input_field would put it into the prompt",
    "weight": "weight_field would multiply it into the weights",
    "token_weights": "token_weight_field would multiply them into the weights of tokens",
}

OnBadExample = Literal["error", "drop"]


class BadExamples:
    """Problems of examples by id, collected until all examples have been checked.

    Args:
      on_bad_example: `error` refuses all bad examples in one message, `drop` leaves them out, with
        a `DataWarning`.

    Attributes:
      source: the name of the file or data set.
      where: a function from an id to its place in the source.

    Example:
      >>> bad = BadExamples("drop")
      >>> bad.add(3, "blank response")
      >>> bad.add(5, "not JSON", "Expecting value")
      >>> bad.summary(8)
      '2 of 8 examples: blank response (1): id 3; not JSON (1): id 5 [Expecting value]'
    """

    def __init__(self, on_bad_example: OnBadExample = "error"):
        if on_bad_example not in ("error", "drop"):
            raise DataError(f"on_bad_example is {on_bad_example!r}; it must be 'error' or 'drop'")
        self.on_bad_example = on_bad_example
        self.source = ""
        self.where: Callable[[int], str] = "id {}".format
        self._found: dict[int, tuple[str, str]] = {}  # what is wrong, and details

    def __contains__(self, example_id: object) -> bool:
        return example_id in self._found

    def __len__(self) -> int:
        return len(self._found)

    def add(self, example_id: int, what: str, detail: str = "") -> None:
        """Records a problem of an example; only the first one is kept."""
        self._found.setdefault(example_id, (what, detail))

    def only(self, start: int, stop: int) -> None:
        """Restricts the collection to the examples [start, stop), renumbered from 0."""
        self._found = {i - start: v for i, v in self._found.items() if start <= i < stop}
        where = self.where
        self.where = lambda i: where(i + start)

    def ids(self) -> list[int]:
        """Returns the ids of the bad examples, sorted."""
        return sorted(self._found)

    def rows(self) -> list[dict[str, int | str]]:
        """Returns one row per bad example, with `id`, `source`, `where` and `reason`."""
        rows: list[dict[str, int | str]] = []
        for i in self.ids():
            reason = ": ".join(filter(None, self._found[i]))
            rows.append({"id": i, "source": self.source, "where": self.where(i), "reason": reason})
        return rows

    def summary(self, size: int) -> str:
        """Returns how many of `size` examples are bad, by problem, with the first places."""
        kinds: dict[str, list[str]] = {}
        for i in self.ids():
            what, detail = self._found[i]
            kinds.setdefault(what, []).append(self.where(i) + (f" [{detail}]" if detail else ""))
        parts, left = [], _SHOWN
        for what, places in kinds.items():
            some = [*places[:left], *["..."] * (len(places) > left)]
            left = max(left - len(places), 0)
            parts.append(f"{what} ({len(places)}): {', '.join(some)}")
        source = f" of {self.source}" if self.source else ""
        return f"{len(self)} of {size} examples{source}: {'; '.join(parts)}"

    def settle(self, size: int) -> None:
        """Raises an error for the bad ones among `size` examples, or warns that they are left out.

        Raises:
          DataError: there are bad examples and `on_bad_example` is `error`, or all are bad.
        """
        if not len(self):
            return
        summary = self.summary(size)
        if self.on_bad_example == "error":
            raise DataError(
                f"cannot use {summary}. Fix the data, or go on without these: scoring."
                "on_bad_example='drop' in a configuration, bad=BadExamples('drop') in a call"
            )
        if len(self) == size:
            raise DataError(f"no example is left: cannot use {summary}")
        warnings.warn(f"left out {summary}", DataWarning, stacklevel=3)


def tell(size: int, ids: Iterable[int], what: str) -> None:
    """Warns about a problem of examples that are used nevertheless."""
    ids = list(ids)
    if ids:
        more = " ..." if len(ids) > 10 else ""
        first = f"ids {ids[:10]}{more}"
        warnings.warn(f"{len(ids)} of {size} examples, {first}: {what}", DataWarning, stacklevel=3)


def tell_unread(where: str, size: int, counts: Mapping[str, int | None]) -> None:
    """Warns about fields of the records that are not read.

    Args:
      where: the file or data set.
      size: how many records it has.
      counts: the number of records with a value, by field; None if it is not known.
    """
    fields = []
    for name, count in sorted(counts.items()):
        some = [] if count is None else [f"in {count} of {size} records"]
        notes = some + [option for key, option in _OPTIONS.items() if key == name]
        fields.append(f"{name!r}" + (f" ({'; '.join(notes)})" if notes else ""))
    if fields:
        warnings.warn(f"{where}: not read: {', '.join(fields)}", DataWarning, stacklevel=3)
