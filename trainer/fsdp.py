"""Dtypes in which the parameters that fsdp cuts travel: gathered in one, their gradients reduced and scattered in another.

The partitioner reduces a gradient in whatever dtype its product happens to have, so this is done by hand: within a
`shard_map` over data and fsdp each device gathers, computes loss and gradients on its own rows, and scatters. To the loss a
device's rows are a batch of their own, as a microbatch is; what comes of them is joined by the same sums.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from . import metrics
from .errors import ConfigError
from .mesh import AXES, BATCH_AXES, MeshConfig


def cut_dims(shapes: Any) -> Any:
    """For each parameter (anything with a NamedSharding) the dim that lies on fsdp; -1 for none."""

    def one(x: Any) -> int:
        spec = tuple(x.sharding.spec) if x.sharding.mesh.shape["fsdp"] > 1 else ()
        return spec.index("fsdp") if "fsdp" in spec else -1

    return jax.tree.map(one, shapes)


def make_cast(config: MeshConfig, shapes: Any, cast: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`cast` for a step, save that parameters which fsdp cuts get the dtype they are gathered in, where there is one."""
    dims, gather = cut_dims(shapes), config.fsdp_gather_dtype

    def one(dim: int, master: Any, other: Any) -> Any:
        return other if dim < 0 or gather is None else master.astype(gather)

    return lambda params: jax.tree.map(one, dims, params, cast(params))


def make_exchange(config: MeshConfig, mesh: Any, shapes: Any, *, mutable: Any) -> Callable[[Callable], Callable]:
    """What makes of a step's `gradients(params, mutable, batch, key)` one that gathers and scatters as `config` says.

    Identity where no dtype is asked for, or nothing is cut. Raises ConfigError for a model with mutable variables: each
    device would have its own.
    """
    dims = cut_dims(shapes)
    if not config.dtypes() or all(dim < 0 for dim in jax.tree.leaves(dims)):
        return lambda gradients: gradients
    if jax.tree.leaves(mutable):
        raise ConfigError(
            f"mesh.fsdp_gather_dtype and fsdp_scatter_dtype do not go with a model that has {', '.join(mutable)}: every device computes "
            "on its own rows, and would come to its own values; leave both unset"
        )
    if mesh.shape["model"] > 1 and mesh.devices.flat[0].platform == "cpu" and config.fsdp_scatter_dtype != "float32":
        raise ConfigError(
            f"XLA's compiler for CPUs cannot sum in fewer bits than float32 where mesh.model={mesh.shape['model']} is more than 1; "
            "set mesh.fsdp_scatter_dtype=float32, or mesh.model=1"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = PartitionSpec(BATCH_AXES)
    specs = jax.tree.map(lambda d: PartitionSpec(*[None] * d, "fsdp") if d >= 0 else PartitionSpec(), dims)

    def gather(dim: int, x: Any) -> Any:
        return x if dim < 0 else jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)

    def reduce(dim: int, grad: Any, master: Any) -> Any:
        if dim < 0:
            return jax.lax.psum(grad.astype(master.dtype), BATCH_AXES)
        grad = grad.astype(config.fsdp_scatter_dtype or grad.dtype)
        return jax.lax.psum(jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=dim, tiled=True), "data")

    def exchange(gradients: Callable) -> Callable:
        def local(params: Any, mutable: Any, batch: Any, key: jax.Array, index: jax.Array) -> tuple:
            whole = jax.tree.map(gather, dims, params)
            (value, weight, grads, found), _ = gradients(whole, mutable, batch, jax.random.fold_in(key, index[0]))
            grads = jax.tree.map(reduce, dims, grads, shapes)
            return grads, jax.tree.map(lambda x: jnp.asarray(x)[None], (value, weight, found))

        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, PartitionSpec(), rows, PartitionSpec(), rows),
            out_specs=(specs, rows),
            axis_names=set(AXES) if mesh.shape["model"] == 1 else set(BATCH_AXES),
            check_vma=False,
        )

        def exchanged(params: Any, mutable: Any, batch: Any, key: jax.Array) -> tuple:
            grads, (value, weight, found) = run(params, mutable, batch, key, jnp.arange(ways))
            return (jnp.sum(value), jnp.sum(weight), grads, join(found, num=ways)), mutable

        return exchanged

    return exchange


def join(found: dict[str, Any], *, num: int) -> dict[str, Any]:
    """Parsed metrics of `num` parts, stacked along a first dim, as those of the whole; halved until one is left."""
    while num > 1:
        half = num // 2
        a, b, rest = (jax.tree.map(lambda x, s=s: x[s], found) for s in (slice(half), slice(half, 2 * half), slice(2 * half, num)))
        found = jax.tree.map(lambda *x: jnp.concatenate(x), metrics.merge_batch(a, b), rest)
        num -= half
    return jax.tree.map(lambda x: x[0], found)
