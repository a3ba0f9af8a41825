"""The training loop: checkpoints that resume exactly, progress, early stopping.

A run that was interrupted and resumed takes the same steps, with the same random numbers, as one that was not: the
checkpoint holds weights, optimizer, schedule, position in the epoch and the generator's state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from training.distributed import ALONE, Parallel, World, sharded_like, whole
from training.tracking import Tracker

Batch = Any


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Steps, optimizer and schedule of one training run."""

    epochs: int
    """Passes over the data at most."""
    steps_per_epoch: int
    """Batches of an epoch, which the schedule is made for."""
    learning_rate: float
    """Peak of the schedule."""
    weight_decay: float = 0.0
    """Of AdamW, on matrices of layers."""
    warmup_steps: int = 100
    """Steps until the peak, at most a tenth of all."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    patience: int = 0
    """Epochs without a smaller log loss before the run stops (0: never)."""
    checkpoint_s: float = 30.0
    """Seconds between checkpoints."""
    seed: int
    """Of the random numbers of processes that a restart starts anew."""
    ema: float = 0.0
    """Decay a step of the average of the weights, which is what is measured and kept (0: the weights)."""


def cosine(config: LoopConfig) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine to zero (factor of the learning rate by step)."""
    total = max(config.epochs * config.steps_per_epoch, 1)
    warm = min(config.warmup_steps, max(total // 10, 1))
    left = max(total - warm, 1)  # a run of one step has none
    return lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * min(1, (s - warm) / left)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices of layers only: not on biases, norms or embeddings."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in kept]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


class Loop:
    """Trains ``model`` on ``batches(epoch)`` with ``loss(batch)``: a mean, or a mean and the number of its terms.

    ``metric()`` after each epoch gives named figures of held-back users; its "log_loss" (smaller is better, and far
    less noisy than a ranking metric of some hundred users) decides on early stopping and on the best weights. {}: the
    last weights are kept, or their average.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoopConfig,
        folder: Path,
        name: str,
        batches: Callable[[int], Iterator[Batch]],
        loss: Callable[[Batch], Any],
        metric: Callable[[], dict[str, float]],
        quiet: bool = False,
        world: World = ALONE,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
        shard: bool = False,
    ) -> None:
        self.model, self.config, self.folder, self.name = model, config, folder, name
        self.batches, self.metric, self.quiet, self.world = batches, metric, quiet or not world.first, world
        self.on_epoch = on_epoch
        self._tracker: Tracker | None = None
        self.loss = Parallel(model, loss, world, shard)
        self.average = {k: p.detach().clone() for k, p in self._trained()} if config.ema else {}
        self.taken = 0
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98),
            fused=next(model.parameters()).is_cuda or None,
        )  # fmt: skip
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, cosine(config))
        self.epoch = self.step = 0
        self.best, self.bad_epochs = math.inf, 0
        self.best_state: dict[str, Tensor] | None = None
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self._sum, self._count = 0.0, 0
        self._saved = time.monotonic()  # when the last checkpoint was written

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(k, p) for k, p in self.model.named_parameters() if p.requires_grad]

    def _swap(self) -> None:
        """Exchanges weights and their average."""
        with torch.no_grad():
            for k, p in self._trained():
                if k in self.average and self.loss.sharded:
                    trained = p.detach().clone()
                    p.copy_(self.average[k])
                    self.average[k].copy_(trained)
                elif k in self.average:
                    self.average[k], p.data = p.data, self.average[k]

    # -- checkpoint ----------------------------------------------------------------------------------
    @property
    def _path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """The first process writes; the others' random numbers start anew after a restart. Sharded processes hand their
        parts to it, so all must call, and the file is the same with or without sharding."""
        if not self.world.first and not self.loss.sharded:
            return
        state = {  # tensors, numbers, texts and None alone: what is loaded runs no code
            "model": whole(self.model.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "position": (self.epoch, self.step, self._sum, self._count),
            "best": (self.best, whole(self.best_state), self.bad_epochs),
            "history": self.history,
            "seconds": self.seconds,
            "average": (whole(self.average), self.taken),
        }
        if not self.world.first:
            return
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._path)

    def resume(self, say: Callable[[str], None] = lambda _: None) -> bool:
        """Takes up a checkpoint of this folder, and says so; False if there is none."""
        if not self._path.exists():
            return False
        state = torch.load(self._path, weights_only=True)
        present = self.model.state_dict()
        self.model.load_state_dict(sharded_like(state["model"], present))
        for index, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            moments = state["optimizer"]["state"].get(index, {})
            of_shape = {k: p for k, v in moments.items() if v.shape == p.shape}
            state["optimizer"]["state"][index] = sharded_like(moments, of_shape)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.step, self._sum, self._count = state["position"]
        if self.world.first:
            torch.set_rng_state(state["rng"])
        else:
            torch.manual_seed(abs(hash((self.config.seed, self.world.rank, self.epoch, self.step))))
        self.best, best_state, self.bad_epochs = state["best"]
        self.best_state = None if best_state is None else sharded_like(best_state, present)
        self.history, self.seconds = state["history"], state["seconds"]
        average, self.taken = state["average"]
        self.average = sharded_like(average, present)
        say(f"{self.name}: resumed at epoch {self.epoch + 1}, step {self.step}")
        return True

    # -- run -------------------------------------------------------------------------------------------
    def run(self, stop_after_steps: int | None = None) -> dict[str, Any]:
        """Trains to the end (or for some steps, saving there); returns losses and metrics by epoch."""
        try:
            return self._run(stop_after_steps)
        finally:
            if self._tracker is not None:
                self._tracker.close()
                self._tracker = None

    def _run(self, stop_after_steps: int | None) -> dict[str, Any]:
        started, before = time.monotonic(), self.seconds
        total = self.config.epochs * self.config.steps_per_epoch
        limit = math.inf if stop_after_steps is None else self.taken + stop_after_steps
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self._saved = started
        with Progress(*columns, disable=self.quiet) as progress:
            done = self.epoch * self.config.steps_per_epoch
            task = progress.add_task(self.name, total=total, completed=done, note="")
            while self.epoch < self.config.epochs and not self._stopped():
                self.model.train()
                for value in self._steps():
                    done = min(total, self.epoch * self.config.steps_per_epoch + self.step)
                    progress.update(task, completed=done, note=f"loss {value:.3f}")
                    self.seconds = before + time.monotonic() - started
                    if self.taken >= limit:
                        self.save()
                        return self.report()
                    self._save_at_times()
                self._end_epoch(progress)
                self.seconds = before + time.monotonic() - started
                self.save()
            if self.epoch < self.config.epochs:
                progress.console.print(
                    f"{self.name}: stopped after epoch {self.epoch} of {self.config.epochs}: "
                    f"the log_loss of the held-back users has not fallen for {self.bad_epochs}; the epoch with the "
                    "lowest is kept",
                    highlight=False,
                )
        if (self.config.patience or self.average) and self.best_state is not None:
            self.model.load_state_dict(self.best_state)
        elif self.average:
            self._swap()
        self.model.eval()
        return self.report()

    def _steps(self) -> Iterator[float]:
        """Takes the steps of an epoch that were not taken before an interruption; the loss of each."""
        for i, batch in enumerate(self.batches(self.epoch)):
            if i >= self.step:
                value = self._take(batch)
                self.step += 1
                yield value

    def _save_at_times(self) -> None:
        if self.loss.agreed(time.monotonic() - self._saved > self.config.checkpoint_s):
            self.save()
            self._saved = time.monotonic()

    def _take(self, batch: Batch) -> float:
        loss, value = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.config.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.taken += 1
        if self.average:
            with torch.no_grad():
                decay = min(self.config.ema, (1 + self.taken) / (10 + self.taken))  # short memory while young
                trained = self._trained()
                torch._foreach_lerp_([self.average[k] for k, _ in trained], [p for _, p in trained], 1 - decay)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.name}: the loss is {value} at epoch {self.epoch + 1}, step {self.step}; lower the learning rate"
            )
        self._sum, self._count = self._sum + value, self._count + 1
        return value

    def _end_epoch(self, progress: Progress) -> None:
        self.model.eval()
        self._swap()
        with self.loss.gathered():
            figures = self.metric()
        entry = {"epoch": self.epoch + 1, "loss": self._sum / max(self._count, 1), **figures}
        self.history.append(entry)
        self._log(entry)
        if not self.quiet:
            held_back = "; held-back users: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items())
            progress.console.print(
                f"{self.name}: epoch {entry['epoch']} of {self.config.epochs}, loss {entry['loss']:.4f}"
                + (held_back if figures else ""),
                highlight=False,
            )
        if figures.get("log_loss", math.inf) < self.best:
            self.best, self.bad_epochs = figures["log_loss"], 0
            self.best_state = {k: v.clone() for k, v in self.model.state_dict().items()}
        else:
            self.bad_epochs += 1
        self._swap()
        self.epoch, self.step, self._sum, self._count = self.epoch + 1, 0, 0.0, 0
        if self.on_epoch is not None:
            self.on_epoch(entry)

    def _log(self, entry: dict[str, float]) -> None:
        if not self.world.first:
            return
        if self._tracker is None:
            self._tracker = Tracker(self.folder, self.name, asdict(self.config))
        self._tracker.log(entry)

    def _stopped(self) -> bool:
        return bool(self.config.patience) and self.bad_epochs >= self.config.patience

    def report(self) -> dict[str, Any]:
        return {
            "epochs": self.history,
            "stopped_early": self._stopped(),
            "seconds": round(self.seconds, 1),
        }
