"""What a run tells: one JSON object a line in metrics.jsonl, trackers, and one readable line per log step (a bar on a
terminal).
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lavis.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)


def _bar() -> Progress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class Tracker(Protocol):
    """A place metrics go beside metrics.jsonl."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record `values` at `step`."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoardTracker:
    """Event files in the run's folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class HostedTracker:
    """Weights & Biases or SwanLab: both are `module.init(...)`, `run.log(values, step=...)`, `run.finish()`."""

    def __init__(self, name: str, folder: Path) -> None:
        import importlib

        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"log.trackers names {name}, which is not installed: pip install {name}.") from error
        self.run = (
            module.init(project="lavis", name=folder.name, dir=str(folder))
            if name == "wandb"
            else module.init(project="lavis", experiment_name=folder.name, logdir=str(folder / "swanlog"))
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def open_trackers(names: Iterable[str], folder: Path) -> list[Tracker]:
    """The trackers of `log.trackers`. Raises ConfigError for one that is not installed."""
    return [TensorBoardTracker(folder) if name == "tensorboard" else HostedTracker(name, folder) for name in names]


class MetricsLog:
    """metrics.jsonl, trackers and the console of the main rank.

    When a run resumes at `step`, later lines are dropped first.
    """

    def __init__(self, folder: Path, trackers: Iterable[str], step: int, total_steps: int) -> None:
        self.file = folder / "metrics.jsonl"
        if self.file.exists():
            kept = [line for line in self.file.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            self.file.write_text("".join(kept))
        self.trackers = open_trackers(trackers, folder)
        self.total_steps = total_steps
        self.started, self.first_step = time.perf_counter(), step
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            self.progress = _bar()
            self.bar = self.progress.add_task("", total=total_steps, completed=step)
            self.progress.start()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line: `kind` (train, valid, test), `step`, `values`; numbers go to the trackers as `kind/name`."""
        with self.file.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
        numbers = {f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, step)

    def train_line(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a training step and show it."""
        self.write("train", step, values)
        eta = (time.perf_counter() - self.started) / max(1, step - self.first_step) * (self.total_steps - step)
        text = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad {values['grad_norm']:.3g}  "
            f"{values['samples_per_s']:.1f} samples/s  {values['tokens_per_s']:.0f} tok/s"
        )
        if "mfu" in values:
            text += f"  mfu {values['mfu']:.0%}"
        if self.progress:
            self.progress.update(self.bar, completed=step, description=text)
        else:
            log.info(
                "step %d/%d  %s  pad %.0f%%  eta %s", step, self.total_steps, text, 100 * values["padding"], _clock(eta)
            )

    def close(self) -> None:
        """End the bar and the trackers."""
        if self.progress:
            self.progress.stop()
        for tracker in self.trackers:
            tracker.close()


def read_metrics(file: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of `kind` in a metrics.jsonl."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: CUDA allocations on a GPU, resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return float("inf")


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"
