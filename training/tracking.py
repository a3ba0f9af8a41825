"""Where the figures of each epoch go: TensorBoard's files always, Weights & Biases where ``--wandb`` asks for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

# An environment variable, as it must reach the training processes that torchrun and Optuna start; it can go when their
# command lines carry --wandb. This module alone reads and writes it.
WANDB = "VIVACE_WANDB"
PROJECT = "vivace"


def use_wandb() -> None:
    """From here on this process and those that it starts log to Weights & Biases too."""
    os.environ[WANDB] = "1"


class Tracker:
    """Writes the figures of one training run in ``folder``. Without a W&B key the W&B run is written offline, to
    ``folder``/wandb, for ``wandb sync``."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        self.name = name
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._run: Any = None
        if os.environ.get(WANDB):
            import wandb

            offline = "WANDB_MODE" not in os.environ and wandb.api.api_key is None
            run_name = f"{folder.parent.name} {name}"
            self._run = wandb.init(
                project=PROJECT, name=run_name, dir=str(folder), config=config, reinit="create_new",
                mode="offline" if offline else None, settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip

    def log(self, entry: dict[str, float]) -> None:
        """Figures of one epoch; ``entry["epoch"]`` counts from 1."""
        epoch = int(entry["epoch"])
        figures = {f"{self.name}/{key}": value for key, value in entry.items() if key != "epoch"}
        for key, value in figures.items():
            self._board.add_scalar(key, value, epoch)
        self._board.flush()
        if self._run is not None:
            self._run.log({**figures, "epoch": epoch})

    def close(self) -> None:
        self._board.close()
        if self._run is not None:
            self._run.finish()
