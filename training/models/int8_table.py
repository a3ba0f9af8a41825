"""Item tables of one byte a number: a row a scale, kept once for reading embeddings and for scoring all items.

A state is quantized by its own largest number (so what else is in the batch does not matter), to seven bits around 64:
with eight-bit rows the sums of pairs stay below 2**15, which CPUs without VNNI need (ONNX Runtime's MatMulInteger).
Axis legend: B states, V item ids, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_LEVELS = 127.0
STATE_LEVELS, STATE_ZERO = 63.0, 64


def quantize_rows(table_VD: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [V, D], float32 scale [V]): value = int8 x scale, the largest of each row at 127."""
    scale_V = table_VD.abs().amax(1).clamp_min(1e-12) / ROW_LEVELS
    return torch.round(table_VD / scale_V[:, None]).to(torch.int8), scale_V.float()


class _Product(torch.autograd.Function):
    """uint8 [B, D] around STATE_ZERO times int8 [D, V], as integers in float32."""

    @staticmethod
    def forward(ctx: Any, states_BD: Tensor, rows_DV: Tensor) -> Tensor:
        return (states_BD.float() - STATE_ZERO) @ rows_DV.float()  # exact: below 2**24 up to a width of 2,000

    @staticmethod
    def symbolic(g: Any, states_BD: Any, rows_DV: Any) -> Any:
        zero = g.op("Constant", value_t=torch.tensor(STATE_ZERO, dtype=torch.uint8))
        product = g.op("MatMulInteger", states_BD, rows_DV, zero)
        return g.op("Cast", product, to_i=1)


class Int8Table(nn.Module):
    """A table of item embeddings; ``forward(ids)`` reads rows, ``scores(states)`` multiplies with all of them."""

    rows_DV: Tensor
    scale_V: Tensor

    def __init__(self, table_VD: Tensor) -> None:
        super().__init__()
        rows, scale = quantize_rows(table_VD)
        self.register_buffer("rows_DV", rows.t().contiguous())
        self.register_buffer("scale_V", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings float32 [..., D] of ids int64 [...]."""
        flat = ids.reshape(-1)
        embeddings = self.rows_DV.index_select(1, flat).t().float() * self.scale_V[flat][:, None]
        return embeddings.reshape(*ids.shape, self.rows_DV.shape[0])

    def scores(self, states_BD: Tensor) -> Tensor:
        """Inner products float32 [B, V] of states float32 [B, D] with every item."""
        scale_B1 = states_BD.abs().amax(1, keepdim=True).clamp_min(1e-12) / STATE_LEVELS
        quantized = (torch.round(states_BD / scale_B1) + STATE_ZERO).to(torch.uint8)
        product: Tensor = _Product.apply(quantized, self.rows_DV)
        return product * scale_B1 * self.scale_V


class Int8Rows(nn.Module):
    """The same numbers, read by rows alone: an embedding lies in one place, so that a table in a mapped file costs a
    request one page an id."""

    rows_VD: Tensor
    scale_V1: Tensor

    def __init__(self, table_VD: Tensor) -> None:
        super().__init__()
        rows, scale = quantize_rows(table_VD)
        self.register_buffer("rows_VD", rows)
        self.register_buffer("scale_V1", scale[:, None].contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings float32 [..., D] of ids int64 [...]."""
        return F.embedding(ids, self.rows_VD).float() * F.embedding(ids, self.scale_V1)
