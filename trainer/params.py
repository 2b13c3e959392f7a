"""Trees of arrays by dotted path, and digests of what they hold.

A digest is taken over logical values (path, dtype, shape, bytes in row-major order), so it is the same for every mesh and
every file layout: two runs have equal weights exactly where their digests are equal.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .errors import ConfigError


def names(path: tuple) -> list[str]:
    """`["block_0", "mlp", "up"]` for the key path of a leaf, as jax.tree_util gives it."""
    return [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]


def dotted_name(path: tuple) -> str:
    """`block_0.mlp.up` for the same."""
    return ".".join(names(path))


def dotted_paths(tree: Any) -> Any:
    """A tree like `tree` whose leaves are their own dotted paths."""
    import jax

    return jax.tree_util.tree_map_with_path(lambda path, _: dotted_name(path), tree)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted path: leaf} in the tree's order; `prefix` goes before each path.

    Raises ConfigError where two leaves have one path, as {"a.b": x} and {"a": {"b": y}} have.
    """
    import jax

    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f"{prefix}.{dotted_name(path)}".strip(".")
        if name in named:
            raise ConfigError(f"two arrays are both called {name!r}, for a name in their paths has a dot; rename one of them")
        named[name] = leaf
    return named


def unflatten(like: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """The inverse of `flatten`: a tree of the structure of `like`. Raises KeyError for a missing path."""
    import jax

    return jax.tree_util.tree_map_with_path(lambda p, _: flat[f"{prefix}.{dotted_name(p)}".strip(".")], like)


def paths(tree: Any) -> list[list[str]]:
    """For each leaf, in the order of `flatten`, the names on its path: what `nested` needs where a name may have a dot."""
    import jax

    return [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def nested(leaves: Iterable[tuple[Sequence[str], Any]]) -> dict[str, Any]:
    """(names on the path, leaf) as nested dictionaries."""
    out: dict[str, Any] = {}
    for (*parents, name), leaf in leaves:
        place = out
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = leaf
    return out


def count(tree: Any) -> int:
    """Number of elements in all arrays of `tree`."""
    import jax

    return sum(x.size for x in jax.tree.leaves(tree))


def digest(flat: Mapping[str, Any]) -> str:
    """sha256 over the arrays of {dotted path: array}, sorted by path."""
    h = hashlib.sha256()
    for chunk in _chunks(flat):
        h.update(chunk)
    return h.hexdigest()


def _chunks(flat: Mapping[str, Any]) -> Iterator[bytes]:
    import numpy as np

    for path in sorted(flat):
        x = np.ascontiguousarray(flat[path])
        yield f"{path}\0{x.dtype}\0{'x'.join(map(str, np.shape(flat[path])))}\0".encode()
        yield x.tobytes()
