"""Distillation: a small retriever learns what a larger one says, beside what the data say.

Axis legend: P positions, S sampled positions, C candidates, V item ids, D and E widths of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.context import Context
from training.models.retrieval import RetrievalModel
from vivace.checks import check_fields, check_minimum, check_positive
from vivace.contract import FIRST_ID


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Weights of the losses that join the loss of the data (0: none), and where they are taken."""

    logits: float = 1.0
    """Kullback-Leibler divergence of the scores over the teacher's best items and as many random ones (Hinton et al.
    2015)."""
    order: float = 0.0
    """Likelihood of the teacher's order of its best items under the student's scores (ListMLE, Xia et al. 2008)."""
    hidden: float = 0.0
    """Difference of the cosine similarities between states, which asks for no common width (Park et al. 2019)."""
    temperature: float = 2.0
    """Of ``logits``, above 0."""
    candidates: int = 100
    """Best items of the teacher."""
    positions: int = 1024
    """Random positions of each batch."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 0, "logits", "order", "hidden")
        check_positive(self, "temperature")
        check_minimum(self, 2, "candidates", "positions")


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

    def loss(
        self, states_PD: Tensor, table_VD: Tensor, bias_V: Tensor, inputs_BT: Tensor, keep_BT: Tensor,
        types_BT: Tensor | None = None, context: Context | None = None,
    ) -> Tensor:  # fmt: skip
        """What the student's states at the kept positions of ``inputs_BT``, events of ``types_BT``, add to its loss.
        ``context``: of the kept positions."""
        config = self.config
        with torch.no_grad():
            encoded_BND = self.model.encode(inputs_BT, self.table, types=types_BT)
            n = encoded_BND.shape[1]  # a teacher that reads the newest events alone says nothing of those before
            read_P = keep_BT.nonzero()[:, 1] >= keep_BT.shape[1] - n
            if context is not None:
                ids, amounts = context
                context = (None if ids is None else ids[read_P], None if amounts is None else amounts[read_P])
            encoded = encoded_BND[keep_BT[:, -n:]]
            teacher_PE = self.model.state(encoded, context)
            chosen = torch.randperm(len(teacher_PE), device=teacher_PE.device)[: config.positions]
            teacher_SE = teacher_PE[chosen]
            scores_SV = F.linear(teacher_SE, self.table, self.model.bias)
            scores_SV[:, :FIRST_ID] = -torch.inf
            best_SC = scores_SV.topk(min(config.candidates, scores_SV.shape[1] - FIRST_ID), dim=1).indices
            other_C = torch.randint(FIRST_ID, scores_SV.shape[1], (best_SC.shape[1],), device=best_SC.device)
        state_SD = states_PD[read_P][chosen]
        of_best_SC = (table_VD[best_SC] @ state_SD[:, :, None])[:, :, 0] + bias_V[best_SC]
        total = states_PD.sum() * 0.0
        if config.logits:
            of_other_SC = F.linear(state_SD, table_VD[other_C], bias_V[other_C])
            teacher_SC = torch.cat([scores_SV.gather(1, best_SC), scores_SV[:, other_C]], 1)
            total = total + config.logits * divergence(
                torch.cat([of_best_SC, of_other_SC], 1), teacher_SC, config.temperature
            )
        if config.order:
            total = total + config.order * list_mle(of_best_SC)
        if config.hidden:
            total = total + config.hidden * relations(state_SD, teacher_SE)
        return total
