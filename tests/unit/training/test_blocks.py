"""The plain mixtures compute what Merlin's do, with the same names of weights."""

from __future__ import annotations

import pytest
import torch

from training.models import blocks

HEADS = ("click", "buy", "add")  # not in alphabetical order: Merlin sorts


@pytest.mark.parametrize("kind", ["mmoe", "ple", "shared"])
def test_plain_blocks_equal_merlins(kind):
    pytest.importorskip("merlin.models.torch")
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    pairs = []
    for plain in (False, True):
        towers = blocks.towers(HEADS, plain)
        mixture = blocks.mixture(kind, 3, 6, 0.2, towers, plain)
        towers(mixture(rows))  # takes the input's width
        pairs.append((mixture.eval(), towers.eval()))
    (mixture, towers), (plain_mixture, plain_towers) = pairs
    plain_mixture.load_state_dict(mixture.state_dict())
    plain_towers.load_state_dict(towers.state_dict())
    expected, got = towers(mixture(rows)), plain_towers(plain_mixture(rows))
    assert list(got) == list(HEADS)
    for name in HEADS:
        torch.testing.assert_close(got[name], expected[name], atol=0, rtol=1e-6)
        assert got[name].abs().sum() > 0
