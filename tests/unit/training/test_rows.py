"""The plain reader gives what Merlin's loader gives."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from training.data.rows import batches_of_rows, values_a_row
from training.distributed import World
from vivace.contract import ITEM, TARGET, USER

COLUMNS = [USER, ITEM, TARGET]


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for part in range(2):
        users = 7 - part
        frame = pd.DataFrame({
            USER: [f"user {part}.{n}" for n in range(users)],
            ITEM: [rng.integers(3, 50, n % 4).astype(np.int64) for n in range(users)],
            TARGET: np.arange(users, dtype=np.int64) + 100 * part,
        })  # fmt: skip
        paths.append(tmp_path / f"{part}.parquet")
        frame.to_parquet(paths[-1])
    return paths


def by_user(files, **how) -> dict[int, tuple[list[int], int]]:
    """User's number to items and target."""
    rows = {}
    for batch in batches_of_rows(files, COLUMNS, 4, **how):
        lists = np.split(batch[f"{ITEM}__values"].numpy().ravel(), batch[f"{ITEM}__offsets"].numpy().ravel()[1:-1])
        users, targets = batch[USER].ravel().tolist(), batch[TARGET].ravel().tolist()
        assert len(users) == len(lists) == len(targets) <= 4
        rows |= {u: (x.tolist(), t) for u, x, t in zip(users, lists, targets, strict=True)}
    return rows


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_plain_reader_gives_merlins_rows(files, shuffle):
    pytest.importorskip("merlin.dataloader")
    merlin, plain = (by_user(files, shuffle=shuffle, seed=3, plain=p) for p in (False, True))
    assert len(plain) == 13 and plain == merlin
    if not shuffle:
        assert list(plain) == list(merlin)


def test_processes_share_the_rows_and_the_seed_sets_the_order(files):
    whole = by_user(files, shuffle=True, seed=3, plain=True)
    assert list(whole) == list(by_user(files, shuffle=True, seed=3, plain=True))
    assert list(whole) != list(by_user(files, shuffle=True, seed=4, plain=True))
    shares = [by_user(files, shuffle=True, seed=3, plain=True, world=World(r, 2, r)) for r in range(2)]
    assert not set(shares[0]) & set(shares[1]) and shares[0] | shares[1] == whole


def test_long_lists_are_read_plainly(files, tmp_path):
    assert values_a_row(files, [ITEM, TARGET]) == pytest.approx(1.5, abs=0.2)  # an empty list counts as one value
    long = tmp_path / "long.parquet"
    rows = [np.arange(300, dtype=np.int64), np.arange(500, dtype=np.int64)]
    pd.DataFrame({USER: ["a", "b"], ITEM: rows, TARGET: [1, 2]}).to_parquet(long)
    assert values_a_row([long], COLUMNS) == 400
    batch = next(batches_of_rows([long], COLUMNS, 4, False, 0))
    assert batch[f"{ITEM}__offsets"].tolist() == [0, 300, 800] and len(batch[f"{ITEM}__values"]) == 800


def test_no_file_is_said():
    with pytest.raises(ValueError, match="vivace prepare"):
        batches_of_rows([], COLUMNS, 4, False, 0)
