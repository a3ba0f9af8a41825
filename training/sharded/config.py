"""How an item table lies over processes. Needs no TorchRec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vivace.checks import check_fields, check_minimum, check_positive


@dataclass(frozen=True, kw_only=True)
class TableSharding:
    """How the item table lies over the processes and learns."""

    kind: Literal["row", "table"] = "row"
    """"row": each process holds a part of the rows; "table": the first process holds the table, the last its biases."""
    learning_rate: float = 0.02
    """Peak rate of row-wise Adagrad; it follows the schedule of the other weights."""
    processes: int = 2
    """Processes that hold the table."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "learning_rate")
        check_minimum(self, 1, "processes")
