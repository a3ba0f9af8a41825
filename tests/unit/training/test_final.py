"""The final fit learns from every event of the log, and no figure is ever made of it on what it has learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preprocessing.caps import learned_from
from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers import open_source
from preprocessing.sequences import WHOLE
from preprocessing.splits import SplitConfig
from training.checkpoints import WEIGHTS, load_ranker, load_retrieval
from training.data.counters import popularity
from training.judge.evaluate import FINAL_FIT, RANKED, RETRIEVAL, SESSIONS, Models, evaluate
from training.learn.final import chosen_epochs, train_final
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.presets import tiny, with_values
from training.refresh.refresh import check_refreshable
from vivace.contract import FIRST_ID, ITEM
from vivace.run import FINAL, RANKING, Run, StaleError

PRESET = with_values(tiny(), {"encoder.neighbours": 4, "ranker.candidates": 20})
LATE = "late"  # an item of the newest session alone


def quiet(_: str) -> None:
    return None


def trained(folder, tests: list[str] | None):
    """(features, run) of sessions of pairs, with a test set that came with them or without."""
    rng = np.random.default_rng(5)
    lines = [f"i{a} i{a} i{a ^ 1}" for a in rng.integers(0, 40, 600)]
    (folder / "train_sessions.txt").write_text("\n".join([*lines, f"i1 {LATE} i1"]) + "\n")
    if tests is not None:
        (folder / "test_prefix_target.tsv").write_text("\n".join(tests) + "\n")
    source, root = open_source("sessions", folder), folder / "run"
    prepare(source, PrepareConfig(split=SplitConfig("sessions"), partitions=2), root, 0, quiet)
    features = Features(root / "features")
    train_retrieval(features, PRESET, root, 3, quiet, True)
    train_ranker(features, PRESET, root, 3, quiet, quiet=True)
    return features, Run(root)


@pytest.fixture(scope="module")
def own_split(tmp_path_factory):
    """(features, run, evaluation before the final fit, manifest of the final fit)."""
    features, run = trained(tmp_path_factory.mktemp("own"), None)
    judged = evaluate(features, PRESET, run.root, 3, quiet)["results"]
    return features, run, judged, train_final(features, PRESET, run.root, quiet, quiet=True)


def test_the_epochs_are_those_that_were_chosen():
    measured = [{"epoch": i, "log_loss": loss} for i, loss in enumerate((3.0, 2.0, 2.5), 1)]
    assert chosen_epochs({"results": {"epochs": measured}}) == 2
    assert chosen_epochs({"results": {"epochs": [{"epoch": 1}, {"epoch": 2}]}}) == 2, "nobody was held back"


def test_it_learns_from_every_event_and_says_so(own_split):
    features, run, _, manifest = own_split
    events = 601 * 3
    assert manifest["results"]["events"] == events
    epochs = manifest["results"]["chosen_epochs"]
    assert manifest["results"]["card"] == f"final fit on all events: {epochs} epochs chosen on validation"
    late = features.items()[ITEM].tolist().index(LATE) + FIRST_ID
    judged, final = (load_retrieval(features, PRESET, run.root, final) for final in (False, True))
    assert judged.popularity[late] == 0 and final.popularity[late] == 1 and final.popularity.sum() == events
    assert not judged.memory.neighbour_shares_VK[late].any() and final.memory.neighbour_shares_VK[late].any()
    for (name, before), after in zip(judged.memory.named_parameters(), final.memory.parameters(), strict=True):
        assert torch.equal(before, after), f"{name} was chosen on validation"
    assert not torch.equal(judged.items.id.weight, final.items.id.weight)


def test_the_ranker_keeps_what_it_learned_over_the_new_vectors_and_counts(own_split):
    features, run, *_ = own_split
    judged, final = (load_ranker(features, PRESET, run.root, final=final) for final in (False, True))
    assert torch.equal(judged.calibration, final.calibration) and torch.equal(judged.key.weight, final.key.weight)
    vectors = load_retrieval(features, PRESET, run.root, final=True).table()
    assert torch.equal(final.item.weight, vectors)
    assert not torch.equal(judged.follower_weights, final.follower_weights)


def test_no_figure_is_made_of_it_on_what_it_has_learned(own_split):
    features, run, judged, _ = own_split
    again = evaluate(features, PRESET, run.root, 3, quiet)["results"]
    assert again == judged and not any(method.startswith(FINAL_FIT) for method in again["table"])
    models = Models(features, PRESET, run.root, [RANKING], final=True)
    with pytest.raises(ValueError, match="the final fit has learned from these test requests"):
        next(models.requests("test"))
    (run.evaluation / "manifest.json").unlink()
    anew = evaluate(features, PRESET, run.root, 3, quiet)["results"]
    assert anew["table"] == judged["table"], "an evaluation made after it is still that of the judged models"


def test_it_is_made_once_and_refused_where_the_judged_models_are_others(own_split):
    features, run, _, manifest = own_split
    assert train_final(features, PRESET, run.root, quiet, quiet=True) == manifest
    before = (run.retrieval / "manifest.json").read_text()
    (run.retrieval / "manifest.json").write_text(before.replace(run.key("retrieval"), "another"))
    try:
        with pytest.raises(StaleError):
            run.key(FINAL)
    finally:
        (run.retrieval / "manifest.json").write_text(before)


def test_caps_hold_for_all_that_is_learned(own_split, tmp_path):
    features, preset, run = own_split[0], with_values(PRESET, {"retrieval.day_events": 2}), Run(tmp_path / "run")
    capped, items = learned_from(features, preset.retrieval.caps, tmp_path / "copies"), features.item_count()
    train_retrieval(features, preset, run.root, 3, quiet, True)
    train_ranker(features, preset, run.root, 3, quiet, quiet=True)
    learned = torch.log1p(torch.tensor(popularity(capped.files("train"), items))).float()
    expected = (learned - learned[FIRST_ID:].mean()) / learned[FIRST_ID:].std()
    torch.testing.assert_close(load_ranker(features, preset, run.root).popularity.cpu(), expected)
    final = train_final(features, preset, run.root, quiet, quiet=True)["results"]["events"]
    assert final == popularity(capped.files(WHOLE), items).sum() < popularity(features.files(WHOLE), items).sum()
    assert not list(run.root.rglob("*learned*")) and not list(run.root.rglob("parts"))
    with pytest.raises(ValueError, match=r"learns under caps.*train and compile anew"):
        check_refreshable(run, preset)


def test_a_test_set_that_came_with_the_log_judges_it_in_rows_of_its_own(tmp_path):
    tests = [f"i{a}\ti{a ^ 1}" for a in range(40)]
    features, run = trained(tmp_path, tests)
    judged = evaluate(features, PRESET, run.root, 3, quiet)["results"]["table"]
    weights = (run.retrieval / WEIGHTS).read_bytes()
    train_final(features, PRESET, run.root, quiet, quiet=True)
    both = evaluate(features, PRESET, run.root, 3, quiet)["results"]["table"]
    assert {name: both[name] for name in judged} == judged and (run.retrieval / WEIGHTS).read_bytes() == weights
    assert {FINAL_FIT + name for name in (RETRIEVAL, RANKED, SESSIONS)} <= set(both)
    assert both[FINAL_FIT + RANKED]["HR@5"] > 0.9
    counts = popularity(features.files(WHOLE), features.item_count())
    assert counts.sum() == 601 * 3, "none of the test set's events"
