"""An exporter of one's own: what was trained as one file of numpy arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lavis.extend import EXPORTERS, Exporter, Trained, Written


@EXPORTERS.register("numpy")
class Numpy(Exporter):
    """trained.npz, whose arrays have the names of the checkpoint's tensors."""

    format = "numpy"  # `lavis export numpy RUN TARGET`; several exporters may share a format, each for other models

    def problem(self, config: object) -> str | None:
        """Why a model with this section can't be written, in a sentence; None if it can."""
        return None

    def write(self, trained: Trained, target: Path, **settings: object) -> Written:
        """Called once `problem` has nothing to say. settings: the command's `precision` and `max_shard_size`."""
        target.mkdir(parents=True, exist_ok=True)
        file = target / "trained.npz"
        np.savez(file, **{name: tensor.float().numpy() for name, tensor in trained.checkpoint.tensors().items()})
        return Written(target, (file,))
