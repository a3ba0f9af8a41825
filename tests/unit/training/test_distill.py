"""What a student learns of a teacher: at the positions that the teacher reads, and at no others."""

from __future__ import annotations

import torch

from tests.unit.training.test_models import ITEMS, _retriever
from training.learn.distill import Distillation, Teacher
from training.models.encoders import EncoderConfig
from vivace.contract import FIRST_ID, PADDING_ID

READS, LENGTH = 4, 12


def test_a_teacher_that_reads_the_newest_events_says_nothing_of_those_before():
    teacher = Teacher(_retriever(EncoderConfig(reads=READS)), Distillation(hidden=1.0, order=0.5), "")
    history = torch.randint(FIRST_ID, ITEMS, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    history[0, :9] = PADDING_ID
    keep = history != PADDING_ID
    states = torch.randn(int(keep.sum()), 16, requires_grad=True)
    loss = teacher.loss(states, torch.randn(ITEMS, 16), torch.zeros(ITEMS), history, keep)
    (gradient,) = torch.autograd.grad(loss, states)
    read = keep.nonzero()[:, 1] >= LENGTH - READS
    assert torch.isfinite(loss) and (gradient[read].abs().sum(1) > 0).all()
    assert not gradient[~read].any() and (~read).any()
