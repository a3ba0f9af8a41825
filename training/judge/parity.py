"""How far two answers to the same requests are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace import contract

TIED = 1e-5  # of scores of magnitude 10: float32 knows no smaller difference


def difference(expected: Sequence[np.ndarray], got: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Share of equal ids of the first tensor, position by position; largest absolute difference of the others.

    A place counts as equal too where the reference's own neighbours have the same score (within TIED: such as variants
    of one product that nobody bought) and the answer has that score there: which of them comes first is chance. The
    second tensor has the scores, [B, N] or as row 0 of [B, C, N]. Values that belong to items are compared item by
    item: two items of equal score may change places.
    """
    reference, answer = list(expected), list(got)
    equal = reference[0] == answer[0]
    if len(reference) > 1:
        score_BN, other_BN = (x[1] if x[1].ndim == 2 else x[1][:, 0] for x in (reference, answer))
        near = np.abs(np.diff(score_BN, axis=1)) <= TIED
        tied = np.pad(near, ((0, 0), (1, 0))) | np.pad(near, ((0, 0), (0, 1)))
        equal |= tied & (np.abs(score_BN - other_BN) <= TIED)
    apart = {names[0]: float(equal.mean())}
    orders = [np.argsort(ids, axis=1, kind="stable") for ids in (reference[0], answer[0])]
    same = np.take_along_axis(reference[0], orders[0], 1) == np.take_along_axis(answer[0], orders[1], 1)
    same &= np.take_along_axis(reference[0], orders[0], 1) != contract.PADDING_ID
    for name, e, g in zip(names[1:], reference[1:], answer[1:], strict=True):
        if name != contract.ENCODED_HISTORY:
            (b, n), rows = reference[0].shape, 1 if e.ndim == 2 else e.shape[1]
            e, g = (
                np.take_along_axis(x.reshape(b, rows, n), o[:, None], 2).swapaxes(1, 2)[same]
                for x, o in zip((e, g), orders, strict=True)
            )
        apart[name] = float(np.abs(e - g).max(initial=0.0))
    return apart
