"""The estimate beside the model: its parameters, the FLOPs that PyTorch counts, and memory by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.estimate import estimate
from training.models.retrieval import RetrievalModel
from training.presets import cpu, huge

ITEMS = 500


def test_parameters_and_flops_are_those_of_the_model():
    preset = replace(cpu(), encoder=replace(cpu().encoder, history=40, dropout=0.0))
    model = RetrievalModel(preset.encoder, ITEMS, torch.zeros(ITEMS))
    found = estimate(preset, ITEMS, 1000)
    assert found.encoder_parameters + found.item_parameters == sum(p.numel() for p in model.parameters())
    history = torch.randint(3, ITEMS, (4, 40))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model.logits(model.encode(history))
        cross_entropy(logits.reshape(-1, ITEMS), history.reshape(-1)).backward()
    assert counter.get_total_flops() / history.numel() == pytest.approx(found.flops, rel=0.05)


def test_sharding_divides_the_states():
    one = replace(huge(), retrieval=replace(huge().retrieval, shard_model=False))
    alone, sharded = estimate(one, 1000, 1e6, 64), estimate(huge(), 1000, 1e6, 64)
    everything = sharded.encoder_parameters + sharded.item_parameters
    assert alone.states_gib == pytest.approx(everything * 16 / 2**30)  # weight, gradient and two moments
    assert sharded.states_gib == pytest.approx(alone.states_gib / 64) and sharded.gathered_gib > 0
    assert sharded.hours == pytest.approx(estimate(huge(), 1000, 1e6, 32).hours / 2)
