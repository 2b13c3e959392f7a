"""How much memory a device needs for one train step, asked of the compiled program; nothing of the state is allocated.

The compiler knows everything that lives during a step, and what of it shares a place: the donated state that comes in and the
new one that goes out. Compiling ahead of time takes what the first step would have taken, and spares it that.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .mesh import batch_sharding, replicated

if TYPE_CHECKING:
    from .module import TrainerModule


def step_arguments(trainer: "TrainerModule") -> tuple[Any, Any, Any, Any]:
    """What `train_step` is called with, as shapes that lie on the mesh."""

    def on(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    num = trainer.trainer_config.steps_per_dispatch
    # To a single device arrays of the host go as they are: a step that was compiled for others would be compiled once more.
    cut = batch_sharding(trainer.mesh, stacked=num > 1) if trainer.mesh.size > 1 else None
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num,) * (num > 1) + x.shape, x.dtype, sharding=cut), trainer.exmp_batch)
    return trainer.shapes, trainer.window_shapes, batch, on(np.array(True), replicated(trainer.mesh))


def step_memory(trainer: "TrainerModule") -> dict[str, int] | None:
    """Bytes on each device: `arguments` (state, batch), `outputs`, of which `aliased` lie where arguments did, `temporaries`, `peak`.

    `peak` is what must be free: arguments, temporaries, and outputs that have no place yet. Compiles the step. None where there is
    no program to be asked: `debug` compiles none, nor may a step of a trainer's own.
    """
    step: Any = trainer.train_step
    if not hasattr(step, "lower"):
        return None
    used = step.lower(*step_arguments(trainer)).compile().memory_analysis()
    found = {
        "arguments": used.argument_size_in_bytes,
        "outputs": used.output_size_in_bytes,
        "aliased": used.alias_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
    }
    return found | {"peak": found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]}
