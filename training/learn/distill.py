"""Distillation: a small retriever learns what a larger one says, beside what the data say.

Axis legend: P positions, S sampled positions, C candidates, V item ids, D and E widths of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.retrieval import RetrievalModel
from vivace.contract import FIRST_ID


@dataclass(frozen=True)
class Distillation:
    """Weights of the losses that join the loss of the data (0: none).

    ``logits``: Kullback-Leibler divergence of the scores over the teacher's ``candidates`` best and as many random
    items (Hinton et al. 2015, with ``temperature``); ``order``: likelihood of the teacher's order of its best ones
    under the student's scores (ListMLE, Xia et al. 2008); ``hidden``: difference of the cosine similarities between
    states, which asks for no common width (relational, Park et al. 2019). On ``positions`` random ones of each batch.
    """

    logits: float = 1.0
    order: float = 0.0
    hidden: float = 0.0
    temperature: float = 2.0
    candidates: int = 100
    positions: int = 1024

    def __post_init__(self) -> None:
        if min(self.logits, self.order, self.hidden) < 0 or self.temperature <= 0:
            raise ValueError(f"Distillation: expected weights >= 0 and a temperature above 0, got {self}")
        if self.candidates < 2 or self.positions < 2:
            raise ValueError(f"Distillation: expected at least 2 candidates and positions, got {self}")


def divergence(student_SC: Tensor, teacher_SC: Tensor, temperature: float) -> Tensor:
    """Mean KL divergence of the two softmax distributions at ``temperature``, times its square."""
    student = F.log_softmax(student_SC / temperature, 1)
    return F.kl_div(student, F.softmax(teacher_SC / temperature, 1), reduction="batchmean") * temperature**2


def list_mle(student_SC: Tensor) -> Tensor:
    """Mean negative log likelihood of the order of the columns (best first) under Plackett and Luce's model."""
    rest = student_SC.flip(1).logcumsumexp(1).flip(1)
    return (rest - student_SC).mean()


def relations(student_SD: Tensor, teacher_SE: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities between all pairs of states."""
    s, t = F.normalize(student_SD, dim=1), F.normalize(teacher_SE, dim=1)
    return F.mse_loss(s @ s.t(), t @ t.t())


class Teacher:
    """A trained retriever that others learn from; it is never changed. ``key``: that of its manifest."""

    def __init__(self, model: RetrievalModel, config: Distillation, key: str) -> None:
        self.model, self.config, self.key = model.eval().requires_grad_(False), config, key
        with torch.no_grad():
            self.table = model.table()

    def loss(self, states_PD: Tensor, table_VD: Tensor, bias_V: Tensor, inputs_BT: Tensor, keep_BT: Tensor) -> Tensor:
        """What the student's states at the kept positions of ``inputs_BT`` add to its loss."""
        c = self.config
        with torch.no_grad():
            teacher_PE = self.model.encode(inputs_BT, self.table)[keep_BT]
            chosen = torch.randperm(len(teacher_PE), device=teacher_PE.device)[: c.positions]
            teacher_SE = teacher_PE[chosen]
            scores_SV = F.linear(teacher_SE, self.table, self.model.bias)
            scores_SV[:, :FIRST_ID] = -torch.inf
            best_SC = scores_SV.topk(min(c.candidates, scores_SV.shape[1] - FIRST_ID), dim=1).indices
            other_C = torch.randint(FIRST_ID, scores_SV.shape[1], (best_SC.shape[1],), device=best_SC.device)
        state_SD = states_PD[chosen]
        of_best_SC = (table_VD[best_SC] @ state_SD[:, :, None])[:, :, 0] + bias_V[best_SC]
        total = states_PD.sum() * 0.0
        if c.logits:
            of_other_SC = F.linear(state_SD, table_VD[other_C], bias_V[other_C])
            teacher_SC = torch.cat([scores_SV.gather(1, best_SC), scores_SV[:, other_C]], 1)
            total = total + c.logits * divergence(torch.cat([of_best_SC, of_other_SC], 1), teacher_SC, c.temperature)
        if c.order:
            total = total + c.order * list_mle(of_best_SC)
        if c.hidden:
            total = total + c.hidden * relations(state_SD, teacher_SE)
        return total
