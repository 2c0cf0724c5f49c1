"""Named plug-ins: one implementation per file, found by its registered name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from longreach.errors import InvalidRequest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to implementations of one interface.

    >>> kinds: Registry[type] = Registry("index kind")
    >>> @kinds.register("flat")
    ... class Flat: ...
    >>> kinds["flat"] is Flat
    True
    """

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an implementation under `name`; a name is taken once."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self._noun} {name!r} is registered already")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise InvalidRequest(
                f"unknown {self._noun} {name!r}; known: {', '.join(sorted(self._entries))}",
                reason="UNKNOWN_NAME",
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
