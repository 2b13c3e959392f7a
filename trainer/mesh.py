"""The mesh of devices and the rules that lay parameters and batches on it.

Four axes, always all there: `data` (batches), `fsdp` (batches and parameters), `pipeline`, `model` (tensor parallel).
Models name the dims of their parameters; `RULES` says on which axis a name may lie.
"""

import logging
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from .config import Config
from .errors import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "pipeline", "model")
BATCH_AXES = ("data", "fsdp")
Dtype = Literal["float32", "bfloat16", "float16"]

# Logical name of a parameter's dim -> mesh axis. `embed` is the dim that fsdp cuts; the others are cut by tensor parallelism.
RULES = {"embed": "fsdp", "vocab": "model", "heads": "model", "kv_heads": "model", "mlp": "model", "norm": None, "head_dim": None}


class MeshConfig(Config):
    """Number of devices along each axis; -1 (one axis at most) takes what the others leave."""

    data: int = Field(-1, ge=-1)
    fsdp: int = Field(1, ge=-1)
    pipeline: int = Field(1, ge=-1)
    model: int = Field(1, ge=-1)
    fsdp_min_size: int = Field(2**14, ge=0)  # parameters with no more values than this stay whole under fsdp
    fsdp_gather_dtype: Dtype | None = None  # of what fsdp cuts, when a step gathers it; None: as the model computes with it
    fsdp_scatter_dtype: Dtype | None = None  # of its gradient, when summed over devices and scattered; None: as it comes

    def dtypes(self) -> dict[str, str]:
        """The dtypes of gathering and scattering that are set: they change bits, so they belong to the fingerprint."""
        found = {"fsdp_gather_dtype": self.fsdp_gather_dtype, "fsdp_scatter_dtype": self.fsdp_scatter_dtype}
        return {k: v for k, v in found.items() if v is not None}

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The axis sizes on `num_devices` devices. Raises ConfigError where they do not fit."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if 0 in sizes.values():
            raise ConfigError(f"mesh axis {next(a for a in AXES if sizes[a] == 0)} is 0; use 1 for an axis that is not used")
        if sizes["pipeline"] != 1:
            raise ConfigError(f"mesh.pipeline={sizes['pipeline']} is not supported yet; set it to 1 and use fsdp or model instead")
        free = [a for a in AXES if sizes[a] == -1]
        if len(free) > 1:
            raise ConfigError(f"mesh axes {', '.join(free)} are all -1; at most one can take what is left")
        fixed = 1
        for axis in AXES:
            fixed *= sizes[axis] if sizes[axis] > 0 else 1
        if free and num_devices % fixed == 0:
            sizes[free[0]] = num_devices // fixed
        elif free or fixed != num_devices:
            product = " x ".join(f"{a}={sizes[a]}" for a in AXES if sizes[a] > 1) or "of one device"
            raise ConfigError(
                f"mesh {product} needs {'a multiple of ' if free else ''}{fixed} devices, but {num_devices} "
                f"{'is' if num_devices == 1 else 'are'} present; set mesh.data=-1 and let the other axes divide {num_devices}"
            )
        return sizes

    def fitting(self, num_devices: int) -> "MeshConfig":
        """This config, or where its axes do not fit so many devices, one with the batch over all of them; what shapes numbers stays."""
        try:
            self.sizes(num_devices)
        except ConfigError as e:
            log.warning("batches are cut over all that there is (%d): %s", num_devices, e)
            return self.replace(**{axis: -1 if axis == "data" else 1 for axis in AXES})
        return self

    def build(self, devices: Any = None) -> "Mesh":
        """The jax mesh over `devices` (default: all). Raises ConfigError where they do not fit."""
        import jax
        import numpy as np

        devices = jax.devices() if devices is None else list(devices)
        shape = tuple(self.sizes(len(devices)).values())
        return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES)


def batch_sharding(mesh: "Mesh", *, stacked: bool = False) -> "NamedSharding":
    """Batches are cut along their first dim over data and fsdp; along the second where several are stacked."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES) if stacked else PartitionSpec(BATCH_AXES))


def replicated(mesh: "Mesh") -> "NamedSharding":
    """The same value on every device."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: "Mesh", shapes: Any, logical_axes: Any, *, fsdp_min_size: int) -> Any:
    """A NamedSharding for each parameter of the tree `shapes` (anything with `.shape`), by the logical names of its dims.

    A dim that its axis does not divide stays whole: an odd vocabulary is no reason to fail.
    """
    import math

    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def one(names: tuple, x: Any) -> "NamedSharding":
        spec: list[str | None] = []
        for name, dim in zip(names, x.shape, strict=True):
            axis = RULES.get(name) if name else None
            if axis == "fsdp" and math.prod(x.shape) <= fsdp_min_size:
                axis = None
            if axis in spec or (axis and dim % mesh.shape[axis]):
                axis = None
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, logical_axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def check_batch(mesh: "Mesh", batch: Any, *, parts: int) -> None:
    """See that the rows of a batch (arrays or shapes) divide over the devices and `parts` microbatches. Raises ConfigError."""
    import jax

    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for x in jax.tree.leaves(batch):
        if x.shape[0] % (ways * parts):
            raise ConfigError(
                f"a batch of {x.shape[0]} rows does not divide over {ways} devices (data x fsdp) and {parts} microbatches; "
                f"make data.batch_size a multiple of {ways * parts}"
            )
