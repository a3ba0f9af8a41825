"""Training that withstands perturbations of the item embeddings.

Source: FGM (Miyato et al. 2017) and adversarial personalised ranking (He et al. 2018, eq. 6 to 8). Axis legend: V item
ids, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vivace.contract import FIRST_ID


def direction(gradient_VD: Tensor) -> Tensor:
    """Each row of a gradient at length one; rows without a gradient stay zero."""
    return gradient_VD / gradient_VD.norm(dim=1, keepdim=True).clamp_min(1e-12)


def adversarial(loss_of: Callable[[Tensor], Tensor], table_VD: Tensor, epsilon: float, weight: float) -> Tensor:
    """``loss_of(table)`` plus ``weight`` times the same at the table moved ``epsilon`` of its mean row length along the
    loss's gradient."""
    loss = loss_of(table_VD)
    (gradient,) = torch.autograd.grad(loss, table_VD, retain_graph=True)
    length = table_VD.detach()[FIRST_ID:].norm(dim=1).mean()
    return loss + weight * loss_of(table_VD + epsilon * length * direction(gradient).detach())
