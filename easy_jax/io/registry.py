"""Registries of the entries that configurations choose by name, such as weightings."""

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from easy_jax.io.checks import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Mapping from the names that configurations use to entries of one kind.

    An entry is registered where it is defined; no other code tests its name. Looking up an unknown
    name raises a `ConfigError` that lists all names and suggests the nearest.

    Args:
      kind: kind of the entries, for messages, such as `"weighting"`.

    Example:
      >>> shapes = Registry("shape")
      >>> @shapes.register("square", former=("box",))
      ... def square(x):
      ...     return x * x
      >>> shapes["square"](3), list(shapes)
      (9, ['square'])
      >>> shapes.find("sqare", "config.shape")
      Traceback (most recent call last):
      easy_jax.io.checks.ConfigError: config.shape is 'sqare'; did you mean 'square'? \
Every shape: square
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._former: dict[str, str] = {}
        self._replaceable: set[str] = set()

    def register(
        self, name: str, *, former: tuple[str, ...] = (), replaceable: bool = False
    ) -> Callable[[T], T]:
        """Returns a decorator that adds an entry.

        Args:
          name: unique name of the entry, preferably the standard term in machine learning.
          former: names in earlier versions, which still find the entry, with a
            DeprecationWarning.
          replaceable: whether the name can be registered again. A configuration file may be
            executed several times, and registers its own entries each time.

        Raises:
          ValueError: the name is already registered.
        """

        def add(entry: T) -> T:
            if name in self._replaceable and replaceable:
                del self._entries[name]
            for each in (name, *former):
                if each in self._entries or each in self._former:
                    raise ValueError(f"there is already a {self.kind} {each!r}")
            self._entries[name] = entry
            self._replaceable |= {name} if replaceable else set()
            self._former |= dict.fromkeys(former, name)
            return entry

        return add

    def find(self, name: str, field: str = "") -> T:
        """Returns the entry with a name.

        Args:
          name: registered or former name.
          field: field that has the name, for messages: `"config.methods[flow].weighting"`.

        Raises:
          ConfigError: the name is unknown; the message suggests the nearest.
        """
        return self._entries[self.canonical(name, field)]

    def canonical(self, name: str, field: str = "") -> str:
        """Returns the registered name for a registered or former name; warns if it is a former one.

        Raises:
          ConfigError: the name is unknown; the message suggests the nearest.
        """
        where = f"{field} is " if field else f"{self.kind} "
        if name in self._former:
            now = self._former[name]
            warnings.warn(f"{where}{name!r}; it is now {now!r}", DeprecationWarning, stacklevel=3)
            return now
        if name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            names = ", ".join(self._entries)
            raise ConfigError(f"{where}{name!r}; {meant}Every {self.kind}: {names}")
        return name

    def __getitem__(self, name: str) -> T:
        return self.find(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
