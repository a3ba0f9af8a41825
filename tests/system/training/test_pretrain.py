"""Pretraining, taking its weights up, and training few parameters."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.support import quiet
from training.checkpoints import load_retrieval
from training.data.counters import popularity
from training.learn.pretrain import OBJECTIVES, Pretraining, augment, halves, pretrain, sessions
from training.learn.retriever import train_retrieval
from training.learn.warm_start import take_up
from training.models.adapters import Adaptation, freeze_for, merge
from training.models.retrieval import EncoderConfig, RetrievalModel
from training.presets import tiny
from vivace.contract import PADDING_ID


@pytest.fixture(scope="module")
def pretrained(features, tmp_path_factory):
    root = tmp_path_factory.mktemp("pretrained")
    manifest = pretrain(features, tiny(), Pretraining(objectives=OBJECTIVES, epochs=2), root, 3, quiet, quiet=True)
    losses = [e["loss"] for e in manifest["results"]["epochs"]]
    assert losses[1] < losses[0]
    return root / "pretrained"


def test_sessions_are_cut_at_pauses():
    torch.manual_seed(0)
    minute = 60_000
    window = torch.tensor([[0, 0, 11, 12, 13, 14, 15], [0, 0, 0, 21, 22, 23, 24]])
    times = torch.tensor([[0, 0, 1, 2, 40, 41, 90], [0, 0, 0, 1, 2, 3, 4]]) * minute
    found = {tuple(map(tuple, torch.cat(sessions(window, times, 1800)).tolist())) for _ in range(30)}
    assert found == {  # the second row is one session: nothing follows it
        ((0, 0, 0, 0, 0, 11, 12), (0, 0, 0, 0, 0, 13, 14)),
        ((0, 0, 0, 11, 12, 13, 14), (0, 0, 0, 0, 0, 0, 15)),
    }
    assert len(sessions(window[1:], times[1:], 1800)[0]) == 0


def test_augmentations_keep_events_and_order():
    torch.manual_seed(0)
    window = torch.tensor([[0, 0, *range(10, 20)], [0] * 11 + [7]])
    for _ in range(30):
        row, single = augment(window, 0.3).tolist()
        events = [i for i in row if i != PADDING_ID]
        assert set(events) <= set(range(10, 20)) and len(events) == len(set(events)) and len(events) in (7, 10)
        assert row[: 12 - len(events)] == [0] * (12 - len(events)) and single == window[1].tolist()


def test_halves_by_hand():
    first, second = halves(torch.tensor([[0, 5, 6, 7], [0, 0, 0, 9]]))
    assert first.tolist() == [[0, 0, 5, 6], [0, 0, 0, 9]] and second.tolist() == [[0, 0, 0, 7], [0, 0, 0, 0]]


def test_training_takes_up_the_pretrained_encoder(features, pretrained, tmp_path):
    model = RetrievalModel(tiny().encoder, features.item_count(), torch.ones(features.item_count()))
    key = json.loads((features.folder / "manifest.json").read_text())["key"]
    report = take_up(model, pretrained, key)
    given = torch.load(pretrained / "weights.pt", weights_only=True)
    assert not report["left"] and torch.equal(model.items.id.weight, given["items.id.weight"])
    other = RetrievalModel(replace(tiny().encoder, history=30), 50, torch.ones(50))  # another vocabulary, longer window
    report = take_up(other, pretrained, "other data")
    assert {"items.id.weight", "bias"} <= set(report["left"])
    assert torch.equal(other.position.weight[-20:], given["position.weight"])
    with pytest.raises(ValueError, match="no encoder weight fits"):
        take_up(RetrievalModel(EncoderConfig(width=8, history=20), 50, torch.ones(50)), pretrained, "other data")
    manifest = train_retrieval(features, tiny(), tmp_path, 3, quiet, quiet=True, start_from=pretrained)
    assert manifest["inputs"]["from"] and len(manifest["results"]["start"]["taken"]) > 5


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_few_parameters_are_trained_and_the_rest_stays(features, pretrained, tmp_path, method):
    preset = replace(tiny(), encoder=replace(tiny().encoder, adapter=4 if method == "adapter" else 0))
    adaptation = Adaptation(method=method, rank=2, items=False)
    manifest = train_retrieval(
        features, preset, tmp_path, 3, quiet, quiet=True, start_from=pretrained, adaptation=adaptation
    )
    sizes = manifest["results"]
    assert sizes["trained_parameters"] < 0.1 * sizes["parameters"]
    tuned = load_retrieval(features, preset, tmp_path).cpu()
    given = torch.load(pretrained / "weights.pt", weights_only=True)
    seen = torch.from_numpy(popularity(features.files("train"), features.item_count()) > 0)  # the rest: see new_items
    assert seen.sum() > 200 and torch.equal(tuned.items.id.weight[seen], given["items.id.weight"][seen])
    changed = not torch.equal(tuned.encoder.blocks[0].qkv.weight, given["encoder.blocks.0.qkv.weight"])
    assert changed == (method == "lora")  # merged into the matrix; an adapter leaves it as it was


def test_merging_lora_changes_no_answer():
    torch.manual_seed(0)
    model = RetrievalModel(EncoderConfig(width=16, heads=2, history=12), 60, torch.ones(60)).eval()
    names = set(model.state_dict())
    freeze_for(model, Adaptation(method="lora", rank=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    history = torch.randint(3, 60, (4, 12))
    before = model.encode(history)
    merge(model)
    torch.testing.assert_close(model.encode(history), before, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == names
