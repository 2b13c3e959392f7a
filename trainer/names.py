"""Names of callbacks and loggers under which they find again what is kept of them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeVar

Part = TypeVar("Part")


def named(parts: Iterable[Part]) -> Iterator[tuple[str, Part]]:
    """Each with its class and place among those of it: others of another class may come or go, and none is given what is not its own."""
    seen = Counter[str]()
    for part in parts:
        kind = type(part).__name__
        yield f"{kind}-{seen[kind]}", part
        seen[kind] += 1
