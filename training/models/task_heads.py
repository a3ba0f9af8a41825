"""Weights of the task losses, and how well the heads' probabilities are calibrated.

Axis legend: H task heads.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

WEIGHTINGS = ("static", "uncertainty", "gradnorm")


def check_weighting(weighting: str, heads: int = 0) -> None:
    """Raises ValueError for a weighting that no number of heads has, or not ``heads`` of them (0: any number)."""
    alone = re.fullmatch(r"only-(0|[1-9][0-9]{0,2})", weighting)
    if weighting in WEIGHTINGS or (alone and (not heads or int(alone[1]) < heads)):
        return
    numbers = f"only-0 to only-{heads - 1}, of {heads} heads" if heads else "only-<number of a head>"
    raise ValueError(f"RankerTraining.weighting: expected one of {list(WEIGHTINGS)} or {numbers}, got {weighting!r}")


class TaskWeights(nn.Module):
    """The sum of the tasks' losses, weighted.

    "static": 1 for the head that orders, 0.5 for the others. "uncertainty": exp(-s) L + s with a learned s each
    (Kendall et al. 2018, eq. 7, up to factors). "gradnorm": weights that draw the norms of the weighted gradients at
    the layer all tasks share to (mean norm) x (relative training rate) ** ``alpha`` (Chen et al. 2018, eq. 1 and 2),
    by a multiplicative step instead of the paper's gradient step; they sum to H. "only-1": head 1 alone, the
    single-task model to compare with.
    """

    weight_H: Tensor
    start_H: Tensor

    def __init__(self, tasks: int, weighting: str = "static", alpha: float = 0.5, rate: float = 0.025) -> None:
        super().__init__()
        check_weighting(weighting, tasks)
        alone = [f"only-{i}" for i in range(tasks)]
        self.weighting, self.alpha, self.rate = weighting, alpha, rate
        self.log_variance = nn.Parameter(torch.zeros(tasks), requires_grad=weighting == "uncertainty")
        first = torch.full((tasks,), 0.5)
        first[0] = 1.0
        if weighting in alone:
            first = torch.eye(tasks)[alone.index(weighting)]
        elif weighting != "static":
            first = torch.ones(tasks)
        self.register_buffer("weight_H", first)
        self.register_buffer("start_H", torch.zeros(tasks))

    def forward(self, losses: list[Tensor], shared: Tensor) -> Tensor:
        """Scalar loss; ``shared`` is a weight of the last layer that all tasks use."""
        loss_H = torch.stack(losses)
        if self.weighting == "uncertainty":
            return (torch.exp(-self.log_variance) * loss_H + self.log_variance).sum()
        if self.weighting == "gradnorm" and self.training and torch.is_grad_enabled():
            self._balance(losses, shared)
        return (self.weight_H * loss_H).sum()

    def _balance(self, losses: list[Tensor], shared: Tensor) -> None:
        norms = [torch.autograd.grad(loss, shared, retain_graph=True)[0].norm() for loss in losses]
        with torch.no_grad():
            now_H = torch.stack([x.detach() for x in losses])
            if not bool(self.start_H.any()):
                self.start_H.copy_(now_H.clamp_min(1e-8))
            norm_H = self.weight_H * torch.stack(norms)
            if not bool((norm_H > 1e-12).all()):  # a head that starts at zero tells the layers below nothing yet
                return
            rate_H = now_H / self.start_H
            target_H = norm_H.mean() * (rate_H / rate_H.mean()) ** self.alpha
            self.weight_H.mul_((target_H / norm_H) ** self.rate)
            self.weight_H.mul_(len(losses) / self.weight_H.sum())
