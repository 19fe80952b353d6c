"""Scalars for TensorBoard: the contents of ``history.json``, written during training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from erde.common.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from erde.common.history import Epoch


class Scalars:
    """Event files in a folder; without one nothing is written."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        if folder is None:
            return
        try:
            import torch.utils.tensorboard  # noqa: F401  # fail before training, not after its first epoch
        except ImportError as error:
            raise UserError(
                "train.tensorboard needs tensorboard, which is not installed: pip install 'erde[train]', or set "
                "train.tensorboard=false"
            ) from error

    def write(self, entry: Epoch, images_per_second: float) -> None:
        """Write one epoch: the learning rate, the speed, and each part, per exit if it has one value per exit."""
        if self._folder is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Hides entries of this and later epochs that a killed process wrote.
            self._writer = SummaryWriter(str(self._folder), purge_step=entry.epoch)
        self._writer.add_scalar("learning_rate", entry.learning_rate, entry.epoch)
        self._writer.add_scalar("images_per_second", images_per_second, entry.epoch)
        values: dict[str, float | list[float]] = dict(entry.parts)
        if entry.health is not None:
            values["health/dead_units"] = [float(dead) for dead in entry.health.dead_units]
            values["health/first_exit_accuracy"] = entry.health.first_exit_accuracy
            if entry.health.probe_accuracy is not None:
                values["health/probe_accuracy"] = entry.health.probe_accuracy
        for name, value in values.items():
            if isinstance(value, list):
                for index, number in enumerate(value):
                    self._writer.add_scalar(f"{name}/exit_{index}", number, entry.epoch)
            else:
                self._writer.add_scalar(name, value, entry.epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
