"""What training takes of the machine's memory, in every row. Time and tokens per second the trainer adds by itself."""

import resource
import sys
from collections.abc import Iterable
from typing import Any, Literal

from .base import Answer, Callback, CallbackPartConfig, Moment


class ThroughputConfig(CallbackPartConfig):
    """Nothing to choose."""

    kind: Literal["throughput"] = "throughput"

    def build(self) -> "Throughput":
        """The callback."""
        return Throughput()


class Throughput(Callback):
    """Adds `memory_host_bytes` and, where the backend counts it, `memory_device_bytes`. Peaks since the process began."""

    def on_row(self, moment: Moment) -> Answer:
        """The two peaks."""
        import jax

        device = device_peak_bytes(jax.local_devices())
        return Answer(values={"memory_host_bytes": host_peak_bytes(), **({} if device is None else {"memory_device_bytes": device})})


def device_peak_bytes(devices: Iterable[Any]) -> int | None:
    """The most bytes that were in use on any one of `devices`; None where none of them says (a CPU does not)."""
    stats = [device.memory_stats() or {} for device in devices]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def host_peak_bytes() -> int:
    """The most memory that this process had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
