"""Linear layers in eight bits and in 2:4 sparsity, put in the place of a model's own. Weights are quantised ahead.

``fp8-rows``: e4m3, a scale for each output channel and, measured at run time, for each row of the input. ``fp8``: one
scale for the weights and one for the input, which ``calibrate`` measured on an example, so that quantising is a cast
that a compiler adds to the kernel before. ``int8``: as fp8-rows, in integers. Where there is no GPU the same arithmetic
is done in float32. Axis legend: P rows, I channels in, O channels out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["fp8", "fp8-rows", "int8"]
LARGEST = {"fp8": 448.0, "fp8-rows": 448.0, "int8": 127.0}
HEADROOM = 1.25  # of a calibrated scale over the largest number of the example
LEAST, MULTIPLE = 64, 16  # channels of a layer that is worth it, and what the kernels ask for


def _quantised(x: Tensor, scale: Tensor, kind: Kind) -> Tensor:
    largest = LARGEST[kind]
    scaled = (x.float() / scale).clamp(-largest, largest)
    return scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)


class EightBitLinear(nn.Module):
    """A trained layer in eight bits; input and output have the 16-bit format of the rest."""

    weight_OI: Tensor
    scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, kind: Kind) -> None:
        super().__init__()
        self.kind: Kind = kind
        weight = layer.weight.detach().float()
        largest = weight.abs().amax() if kind == "fp8" else weight.abs().amax(1, keepdim=True)
        scale = largest.clamp_min(1e-12) / LARGEST[kind]
        self.register_buffer("weight_OI", _quantised(weight, scale, kind))
        self.register_buffer("scale", scale if kind == "fp8" else scale.t().contiguous())
        self.register_buffer("input_scale", torch.ones((), device=weight.device))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        shape, x_PI = x.shape, x.reshape(-1, x.shape[-1])
        if self.kind == "fp8":
            scale = self.input_scale
        else:
            scale = x_PI.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / LARGEST[self.kind]
        q_PI, weight_IO = _quantised(x_PI, scale, self.kind), self.weight_OI.t()
        if self.kind == "int8" and x.is_cuda:
            y_PO = torch._int_mm(q_PI, weight_IO).float() * scale * self.scale
        elif x.is_cuda:
            bias = self.bias if self.bias is None else self.bias.to(torch.bfloat16)
            y_PO = torch._scaled_mm(
                q_PI, weight_IO, scale, self.scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            return y_PO.to(x.dtype).view(*shape[:-1], self.out_features)
        else:
            y_PO = (q_PI.float() @ weight_IO.float()) * scale * self.scale
        if self.bias is not None:
            y_PO = y_PO + self.bias
        return y_PO.to(x.dtype).view(*shape[:-1], self.out_features)


def fits(layer: nn.Linear) -> bool:
    """Whether a layer is large enough and of sizes that the kernels take."""
    i, o = layer.in_features, layer.out_features
    return min(i, o) >= LEAST and not i % MULTIPLE and not o % MULTIPLE


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module | None]) -> int:
    """Puts ``make(layer)`` in the place of each linear layer that fits (None: keep it); how many."""
    count = 0
    for name, child in list(module.named_children()):
        new = make(child) if isinstance(child, nn.Linear) and fits(child) else None
        if new is not None:
            setattr(module, name, new)
            count += 1
        else:
            count += replace_linears(child, make)
    return count


def input_scales(module: nn.Module, example: Callable[[], object]) -> dict[int, Tensor]:
    """The scale of each linear layer's input, by the layer's id: of the largest number that ``example`` gives it."""
    largest: dict[int, Tensor] = {}

    def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        now = given[0].detach().abs().amax().float()
        largest[id(layer)] = torch.maximum(largest.get(id(layer), now), now)

    hooks = [layer.register_forward_pre_hook(see) for layer in module.modules() if isinstance(layer, nn.Linear)]
    try:
        with torch.no_grad():
            example()
    finally:
        for hook in hooks:
            hook.remove()
    return {key: (value * HEADROOM).clamp_min(1e-12) / LARGEST["fp8"] for key, value in largest.items()}


def quantise(module: nn.Module, kind: Kind, example: Callable[[], object]) -> int:
    """Replaces the linear layers that fit by eight-bit ones; how many. ``example`` runs the module, for the scales."""
    scales = input_scales(module, example) if kind == "fp8" else {}

    def make(layer: nn.Linear) -> nn.Module | None:
        if kind == "fp8" and id(layer) not in scales:
            return None
        new = EightBitLinear(layer, kind)
        if kind == "fp8":
            new.input_scale = scales[id(layer)]
        return new

    return replace_linears(module, make)


def two_of_four(weight_OI: Tensor) -> Tensor:
    """The weights with the two smallest of every four neighbours at zero."""
    groups = weight_OI.reshape(-1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, 1).indices, True)
    return (groups * keep).view_as(weight_OI)


def sparsify(module: nn.Module, semi_structured: bool = True) -> int:
    """Makes the weights of the layers that fit 2:4 sparse, and with ``semi_structured`` stores them as such (CUDA
    only); how many."""
    count = 0
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and fits(layer):
            sparse = two_of_four(layer.weight.detach())
            stored = torch.sparse.to_sparse_semi_structured(sparse.contiguous()) if semi_structured else sparse
            layer.weight = nn.Parameter(stored, requires_grad=False)
            count += 1
    return count
