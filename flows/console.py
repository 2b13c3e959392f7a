"""What a command shows while it works: a live line on a terminal, plain lines elsewhere. All of it goes to stderr."""

import contextlib
import logging
import os
import sys
import time
from typing import Any

from tasks.logs import LOGGERS


def say(text: str = "") -> None:
    """A line for people. Where nobody reads any more, because a terminal or a pipe was closed, work goes on in silence."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process


class Lines(logging.Handler):
    """Log records as short lines. Prefect's own are in its UI; what they say of an error, the command says itself."""

    def __init__(self, display: "Display"):
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(message)s"))  # with a formatter of its own, Prefect leaves the handler alone
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        ours = record.name.split(".")[0] in LOGGERS
        if record.name.split(".")[0] == "prefect" or (not ours and record.levelno < logging.WARNING):
            return
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        self._display.line(text)


class Display:
    """Lines, and on a terminal a bar of steps below them."""

    def __init__(self, *, total: int | None = None):
        self.total = total
        self._live: Any = None
        self._last: dict[str, Any] = {}
        self._rate: tuple[float, int] | None = None
        if total is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("step {task.completed:>6.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[values]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar = self._live.add_task("starting", total=total, values="")

    def __enter__(self) -> "Display":
        self._handler = Lines(self)
        root = logging.getLogger()
        self._before = (root.handlers[:], root.level)
        root.handlers = [self._handler]
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO)
        for name in ("APILogWorker", "EventsWorker"):  # at every end they warn of one item left, which is their own mark of the end
            logging.getLogger(name).setLevel(logging.ERROR)
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        logging.getLogger().handlers = self._before[0]

    def stop(self) -> None:
        """Take the live line away; what is shown from now on is plain."""
        if self._live:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        """Show one line."""
        if self._live:
            with contextlib.suppress(OSError, ValueError):
                self._live.console.print(text, markup=False, highlight=False)
        else:
            say(f"{time.strftime('%H:%M:%S')}  {text}")

    def tell(self, kind: str, value: Any) -> None:
        """Hear of the trainer's rows and signs of life; see tasks.session.Listener."""
        with contextlib.suppress(OSError, ValueError):
            self._tell(kind, value)

    def _tell(self, kind: str, value: Any) -> None:
        if kind == "beat":
            self._at(value["step"], value["phase"])
        elif kind == "prepare":
            self._preparing(value)
        elif kind == "row":
            split, step, values = value
            if split == "train":
                self._train_row(step, values)
            else:
                shown = {k: values[k] for k in ("loss", "bits_per_byte", "accuracy") if values.get(k) is not None}
                self.line(f"{split} at step {step}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in shown.items()))

    def _preparing(self, progress: Any) -> None:
        if self._live:
            self._live.update(self._bar, description="preparing data", values=str(progress))

    def _at(self, step: int, phase: str) -> None:
        if self._live and step >= 0:
            self._live.update(self._bar, completed=step, description={"step": "training"}.get(phase, phase))

    def _train_row(self, step: int, values: dict[str, Any]) -> None:
        loss, speed = values.get("loss_mean"), values.get("throughput_tokens_per_s")
        parts = ([f"loss {loss:.4f}"] if loss is not None else []) + ([f"{speed:,.0f} tokens/s"] if speed else [])
        if self._live:
            self._live.update(self._bar, completed=step, values="  ".join(parts))
            return
        if self.total and (seconds := values.get("time_step_s")):
            parts.append(f"ETA {duration(seconds * (self.total - step))}")
        self.line(f"step {step}/{self.total}  " + "  ".join(parts))


class Preparing:
    """How far a preparation is: a bar on a terminal, elsewhere a line now and then."""

    EVERY = 10.0  # seconds between two lines

    def __init__(self, display: Display):
        self._display = display
        self._bar: Any = None
        self._last = 0.0

    def __enter__(self) -> "Preparing":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._display._live = self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()

    def advance(self, progress: Any) -> None:
        """Show `progress` of a stage; see tasks.preparation.progress."""
        if self._bar:
            with contextlib.suppress(OSError, ValueError):
                self._bar.update(self._task, completed=progress.fraction, description=str(progress))
        elif progress.num_jobs and (time.monotonic() - self._last > self.EVERY or progress.jobs_done == progress.num_jobs):
            self._last = time.monotonic()
            self._display.line(str(progress))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
