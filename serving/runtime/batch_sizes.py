"""Sizes of batches that CUDA graphs are recorded for: a recorded sequence of kernels is for one shape."""

from __future__ import annotations

SMALLEST = 8  # a batch of one takes a GPU about as long


def padded_sizes(largest: int) -> tuple[int, ...]:
    """Powers of two up to ``largest``, which is one of them in any case; a batch is filled up to the next of these."""
    sizes, size = [], min(SMALLEST, largest)
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest)


def padded(rows: int, sizes: tuple[int, ...]) -> int:
    """The size that ``rows`` are filled up to. Raises ValueError for more rows than the largest."""
    for size in sizes:
        if rows <= size:
            return size
    raise ValueError(f"batch: expected at most {sizes[-1]} rows, got {rows}")
