"""What the weights of an encoder must be while it trains: sparse, or ready to be rounded to eight bits.

``sparsity`` "2:4" keeps the two largest of every four weights of a row, the pattern that tensor cores skip (Mishra
et al. 2021); a share such as "0.8" zeroes that share of the smallest weights of each matrix, anywhere. ``int8`` trains
with weights rounded by row and activations by tensor, gradients passing as if nothing were rounded (Jacob et al. 2018),
for engines whose quantization after training loses too much. All of it holds for the matrices of the encoder's layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vivace.checks import check_fields

LEVELS = 127.0
MEMORY = 0.99  # of the running range of an activation


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What the matrices of an encoder's layers must be; by default anything."""

    sparsity: str = ""
    """"2:4", or a share of zeros between 0 and 1 such as "0.8"; "": dense."""
    int8: bool = False
    """Whether it trains with weights and activations rounded to eight bits."""

    def __post_init__(self) -> None:
        check_fields(self, {"sparsity": "--sparsity"})
        if self.sparsity not in ("", "2:4"):
            try:
                share = float(self.sparsity)
            except ValueError:
                share = -1.0
            if not 0.0 < share < 1.0:
                raise ValueError(f'--sparsity: expected "2:4" or a share between 0 and 1, got {self.sparsity!r}')

    def __bool__(self) -> bool:
        return bool(self.sparsity) or self.int8


def largest(weight: Tensor, sparsity: str) -> Tensor:
    """Which weights stay, bool of the shape of ``weight`` [out, in]. Raises ValueError where "2:4" does not divide."""
    size = weight.detach().abs()
    if sparsity == "2:4":
        if weight.shape[1] % 4:
            raise ValueError(f"--sparsity 2:4: expected an input width that is a multiple of 4, got {weight.shape[1]}")
        fours = size.view(weight.shape[0], -1, 4)
        kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True)
        return kept.view_as(weight)
    drop = round(float(sparsity) * weight.numel())
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[size.flatten().argsort()[:drop]] = False
    return kept.view_as(weight)


class Masked(nn.Module):
    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` on the grid of ``scale``; the gradient is that of ``x``."""
    return x + (torch.round(x / scale).clamp(-LEVELS, LEVELS) * scale - x).detach()


class RoundedRows(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return rounded(weight, weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-12) / LEVELS)


class RoundedInput:
    """Forward pre-hook of a linear layer: rounds its input by the running range of what it has seen in training."""

    def __init__(self) -> None:
        self.range = torch.zeros(())

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if module.training:
            now = x.detach().abs().amax().cpu()
            self.range = now if not self.range else MEMORY * self.range + (1 - MEMORY) * now
        if not self.range:
            return inputs
        return (rounded(x, (self.range / LEVELS).to(x.device)), *inputs[1:])


def layers(model: nn.Module) -> Iterator[nn.Linear]:
    """The matrices that a constraint is for."""
    for module in model.encoder.modules():  # type: ignore[union-attr, operator]
        if isinstance(module, nn.Linear):
            yield module


def constrain(model: nn.Module, constraint: Constraint) -> None:
    """Puts ``constraint`` on the matrices of the encoder, by their weights as they are now."""
    for layer in list(layers(model)):
        if constraint.sparsity:
            parametrize.register_parametrization(layer, "weight", Masked(largest(layer.weight, constraint.sparsity)))
        if constraint.int8:
            parametrize.register_parametrization(layer, "weight", RoundedRows())
            layer.register_forward_pre_hook(RoundedInput())


def release(model: nn.Module) -> None:
    """Ends the training under a constraint: the weights keep the values that they had under it."""
    for layer in layers(model):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        for key in [k for k, hook in layer._forward_pre_hooks.items() if isinstance(hook, RoundedInput)]:
            del layer._forward_pre_hooks[key]
