"""The training loop around a sharded item table: its rate, its checkpoints, its best epoch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress

from training.learn.loop import Batch, Loop, cosine
from training.sharded.objective import Negatives
from training.sharded.table import ShardedItems
from vivace.manifest import replaced

CHECKPOINT, BEST = "checkpoint", "best"  # folders of a step
DENSE = "checkpoint.pt"  # in them: everything but the table


class ShardedLoop(Loop):
    """``Loop`` over the weights that every process has, with the item table beside them. A checkpoint is a folder: a
    file of each process's rows and the first one's file of the rest. It changes as one: a process that dies while it is
    written leaves the one before. Its reader may have another number of processes; all must see the folder."""

    def __init__(self, items: ShardedItems, negatives: Negatives, *arguments: Any) -> None:
        """``arguments``: those of ``Loop``."""
        super().__init__(*arguments)
        self.items, self.negatives = items, negatives
        self._factor = cosine(self.config)
        self._into = self.folder / CHECKPOINT

    @property
    def _path(self) -> Path:
        return self._into / DENSE

    def _take(self, batch: Batch) -> float:
        self.negatives.step = self.taken
        self.items.rate(self._factor(self.taken))
        return super()._take(batch)

    def _wished(self, wish: bool) -> bool:
        """What the first process wishes: all must save together, and clocks differ."""
        agreed = torch.tensor(int(wish), device=self.items.device)
        dist.broadcast(agreed, 0)
        return bool(agreed)

    def _save_at_times(self) -> None:
        if self._wished(time.monotonic() - self._saved > self.config.checkpoint_s):
            self.save()
            self._saved = time.monotonic()

    def save(self) -> None:
        self.write_table(self.folder / CHECKPOINT, super().save)

    def write_table(self, folder: Path, dense: Callable[[], None] = lambda: None) -> None:
        """Puts the table, and what ``dense`` writes into ``self._into``, in the place of ``folder``."""
        with replaced(folder) if self.world.first else contextlib.nullcontext():
            self.world.barrier()
            self._into = folder.with_name(folder.name + ".partial")
            self.items.save(self._into)
            dense()
            self.world.barrier()
        self._into = self.folder / CHECKPOINT

    def resume(self, say: Callable[[str], None] = lambda _: None) -> bool:
        old = self.folder / f"{CHECKPOINT}.old"
        if self.world.first and old.exists() and not self._into.exists():  # died between the two renames
            old.rename(self._into)
        self.world.barrier()
        if not super().resume(say):
            return False
        self.items.load(self._into)
        return True

    def _end_epoch(self, progress: Progress) -> None:
        best = self.best
        super()._end_epoch(progress)
        if self.best < best and self.config.patience:
            self.write_table(self.folder / BEST, self._write_best)

    def _write_best(self) -> None:
        if self.world.first:
            torch.save(self.best_state, self._path)

    def run(self, stop_after_steps: int | None = None) -> dict[str, Any]:
        report = super().run(stop_after_steps)
        if stop_after_steps is None and self.config.patience and self.best_state is not None:
            self.model.load_state_dict(torch.load(self.folder / BEST / DENSE, weights_only=True))
            self.items.load(self.folder / BEST)
        return report
