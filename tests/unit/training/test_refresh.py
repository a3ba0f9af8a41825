"""A refresh learns what was appended, judges by what nobody has learned, and changes the run whole or not at all."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from preprocessing.refresh import appended_since, read_catalogue, refresh_features
from preprocessing.sequences import WHOLE
from serving.exchange import WORK, finish_exchange
from training.checkpoints import load_ranker, load_retrieval
from training.compile.compiler import compile_models
from training.data.counters import popularity
from training.judge.evaluate import Models, evaluate
from training.learn.final import train_final
from training.learn.ranker import train_ranker
from training.learn.retriever import train_retrieval
from training.presets import tiny
from training.refresh.carry import served_models
from training.refresh.fit import MoreTraining, learned_lengths, sequences_to_learn
from training.refresh.judge import decide
from training.refresh.refresh import NOTHING, PUBLISHED, REFUSED, RefreshConfig, refresh
from training.refresh.replay import Renewals, sequences_before
from vivace.contract import FIRST_ID, ITEM, TARGET, TARGET_TIME, TIME, USER
from vivace.manifest import read_manifest
from vivace.run import COMPILED, FINAL, RANKING, Run
from vivace.store.interface import Event
from vivace.store.lmdb_store import LmdbStore

START = 1_790_000_000_000
STEPS = ("features", "retriever", "ranker", "judge", "final", "evaluate", "compile", "exchange")
LATE = "sku-00007"  # what only judged events hold
NEW = ("new-1", "new-2")


def quiet(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def served_root(tmp_path_factory) -> Path:
    """A small shop as it is served, with a final fit."""
    root = tmp_path_factory.mktemp("refresh") / "shop"
    prepare(Shop(ShopConfig(users=200, items=80, events=4000, seed=5)), PrepareConfig(partitions=2), root, 5, quiet)
    features = Features(root / "features")
    train_retrieval(features, tiny(), root, 5, quiet, quiet=True)
    train_ranker(features, tiny(), root, 5, quiet, quiet=True)
    evaluate(features, tiny(), root, 5, quiet)
    train_final(features, tiny(), root, quiet, quiet=True)
    compile_models(features, tiny(), root, 5, quiet)
    return root


@pytest.fixture
def run(served_root, tmp_path) -> Run:
    shutil.copytree(served_root, tmp_path / "shop", symlinks=True)
    return Run(tmp_path / "shop")


def append(run: Run, count: int = 400, start: int = START) -> list[Event]:
    """Appends views, one a second; of the last fifth some of LATE."""
    rng, store = np.random.default_rng(count), LmdbStore(run.feature_store)
    users = sorted(store.users())
    events = []
    for i in range(count):
        late = i >= 0.8 * count and i % 3 == 0
        item = LATE if late else f"sku-{10 + int(rng.integers(60)):05d}"
        events.append(Event(users[int(rng.integers(len(users)))], item, ("view", "buy")[i % 2], start + 1000 * i))
    store.append(events)
    store.close()
    return events


def taken_up(run: Run, catalogue: pd.DataFrame | None = None) -> Features:
    """The features of ``run`` with all that was appended."""
    old = Features(run.features)
    appended = appended_since(run.feature_store, old.log_number())
    refresh_features(old, appended, run.root / WORK / "features", 0.2, catalogue, quiet)
    return Features(run.root / WORK / "features")


def events_of(features: Features, part: str) -> Counter:
    """(user, item id, time) of the events of a part's sequences."""
    found: Counter = Counter()
    for file in features.files(part):
        for row in pq.read_table(file, columns=[USER, ITEM, TIME]).to_pylist():
            found.update((row[USER], i, t) for i, t in zip(row[ITEM], row[TIME], strict=True))
    return found


def targets_of(features: Features, part: str) -> Counter:
    rows = [r for f in features.files(part) for r in pq.read_table(f, columns=[USER, TARGET, TARGET_TIME]).to_pylist()]
    return Counter((r[USER], r[TARGET], r[TARGET_TIME]) for r in rows)


def state_of(root: Path) -> dict[str, str]:
    """Checksums of all that belongs to a run; its work and its store are no part of it."""
    skipped = {WORK, "feature_store", ".lock"}
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.relative_to(root).parts[0] not in skipped]
    sums = {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return sums | {"link": os.readlink(root / "model_repository")}


# -- features ------------------------------------------------------------------------------------------
def test_an_appended_event_is_there_once_and_old_ids_stay(run):
    old = Features(run.features)
    before, events = events_of(old, WHOLE), append(run)
    names = old.items()[ITEM].tolist()
    user, _, time_ms = next(key for key in before if key[2] % 1000)
    item = names[next(k[1] for k in before if k[0] == user and k[2] == time_ms) - FIRST_ID]
    store = LmdbStore(run.feature_store)
    store.append([Event(user, item, "view", time_ms), *events[:5]])  # of the data set; sent twice without an id
    store.append([Event(user, "no such item", "view", START + 1)])
    store.close()
    new = taken_up(run)
    assert new.items()[ITEM].tolist() == names and new.item_count() == old.item_count()
    appended = Counter((e.user_id, names.index(e.item_id) + FIRST_ID, e.timestamp_ms) for e in events)
    assert events_of(new, WHOLE) == before + appended and max(appended.values()) == 1
    assert len(new.events()[ITEM]) == sum(before.values()) + len(events)
    counted = read_manifest(new.folder, "")["results"]["refresh"]
    assert counted["taken"] == 400 and counted["twice"] == 5 and counted["had before"] == 1
    assert counted["of items without a catalogue row"] == 1


def test_no_judged_event_is_learned_and_each_is_judged_once(run):
    events = append(run)
    new, names = taken_up(run), Features(run.features).items()[ITEM].tolist()
    late = names.index(LATE) + FIRST_ID
    first_test, first_valid = START + 320_000, START + 240_000
    before = sum(count for (_, item, _), count in events_of(Features(run.features), WHOLE).items() if item == late)
    assert popularity(new.files("train"), new.item_count())[late] == before, "what the data set had of it"
    assert max(t for *_, t in events_of(new, "train")) < first_valid
    targets = {part: targets_of(new, part) for part in ("valid", "test")}
    assert all(first_valid <= t < first_test for *_, t in targets["valid"])
    assert all(t >= first_test for *_, t in targets["test"]) and max(targets["test"].values()) == 1
    live = {(e.user_id, names.index(e.item_id) + FIRST_ID, e.timestamp_ms) for e in events}
    assert set(targets["test"]) <= live and any(item == late for _, item, _ in targets["test"])
    learned = learned_lengths(Features(run.features).files(WHOLE))
    sequences, fresh = sequences_to_learn(new.files("train"), learned, 20, 1.0, 0)
    assert 0 < fresh < len(sequences) and max(int(s[-1, 1]) for s in sequences) < first_valid
    planted = {t for u, i, t in live if t < first_valid}
    assert sum(int(t) in planted for s in sequences for t in s[:, 1]) == len(planted), "each new event, once"


def test_new_items_stand_behind_the_old_ones_and_labels_are_those_of_the_type(run, tmp_path):
    old = Features(run.features)
    names, row = old.items()[ITEM].tolist(), pd.read_parquet(old.folder / "catalogue.parquet").iloc[3]
    rows = pd.DataFrame({ITEM: NEW, "title": [row["title"]] * 2, "category": row["category"], "brand": "nobody's"})
    rows.assign(price=9.0).to_csv(tmp_path / "new.csv", index=False)
    store = LmdbStore(run.feature_store)
    user = min(store.users())
    store.append(
        [Event(user, NEW[i % 2], kind, START + 1000 * i) for i, kind in enumerate(("buy", "view", "?", "") * 5)]
    )
    store.close()
    new = taken_up(run, read_catalogue(tmp_path / "new.csv", old.schema, tmp_path / "rejects.csv"))
    assert new.items()[ITEM].tolist() == [*names, *NEW]
    encoded = new.items().iloc[-1]
    assert encoded["category"] == old.items().iloc[3]["category"] and encoded["brand"] == 2, "out of vocabulary"
    (mine,) = (
        r for f in new.files(WHOLE) for r in pq.read_table(f).to_pylist() if r[USER] == user
    )  # fmt: skip
    assert mine["label_buy"][-20:] == [1, 0, 0, 0] * 5 and mine["label_click"][-20:] == [1] * 20
    assert mine["event_type"][-20:-16][2:] == [2, 1], "a type that is new; none"
    with pytest.raises(ValueError, match="missing"):
        rows.to_csv(tmp_path / "bad.csv", index=False)
        read_catalogue(tmp_path / "bad.csv", old.schema, tmp_path / "rejects.csv")


def test_old_models_judge_as_they_are_served_over_the_larger_catalogue(run, tmp_path):
    append(run, 200)
    old = Features(run.features)
    same = taken_up(run)
    before = load_retrieval(old, tiny(), run.root, final=True)
    retriever, ranker = served_models(run, old, same, tiny())
    assert all(
        (a == b).all() for a, b in zip(before.state_dict().values(), retriever.state_dict().values(), strict=True)
    )
    shutil.rmtree(run.root / WORK)
    rows = pd.DataFrame({ITEM: NEW, "title": "Alto Oak lamp 3", "category": "lamp", "brand": "Alto", "price": 9.0})
    larger = taken_up(run, rows.assign(text=rows["title"]))
    retriever, ranker = served_models(run, old, larger, tiny())
    known = old.item_count()
    assert retriever.table().shape[0] == known + 2 and retriever.table()[known:].abs().sum() > 0
    assert (retriever.popularity[known:] == 0).all() and (ranker.follower_weights[known:] == 0).all()


# -- decision ------------------------------------------------------------------------------------------
def test_what_is_published_and_why():
    rng = np.random.default_rng(0)
    old = rng.integers(0, 10, 4000)
    assert decide(old, old).publish and decide(old, old).ndcg_change == (0.0, 0.0, 0.0)
    better, worse = decide(old, np.maximum(old - 1, 0)), decide(old, old + 3)
    assert better.publish and better.reason.startswith("better") and better.ndcg_change[1] > 0
    assert not worse.publish and worse.reason.startswith("worse")
    few = decide(old[:12], rng.permutation(old[:12]))
    assert not few.publish and few.reason.startswith("not sure")
    assert not decide(old[:16], old[:16]).publish, "so few say nothing, even where none changes"
    forced = decide(old, old + 3, force=True)
    assert forced.publish and forced.forced
    one = decide(np.array([0, 2]), np.array([2, 2]), bound=1.0)
    assert one.ndcg == (0.75, 0.5) and one.hit_rate == (1.0, 1.0)
    assert not decide(old[:0], old[:0]).publish


# -- the whole step ------------------------------------------------------------------------------------
def test_a_worse_model_is_not_published_and_the_run_stays(run):
    append(run)
    before = state_of(run.root)
    config = RefreshConfig(more=MoreTraining(rate=1e5))
    outcome = refresh(run, tiny(), config, quiet)
    assert outcome.status == REFUSED and outcome.decision is not None
    assert outcome.decision.reason.startswith(("worse", "training broke"))
    assert state_of(run.root) == before
    said: list[str] = []
    assert refresh(run, tiny(), config, said.append).status == NOTHING
    assert "those before were refused" in said[-1]
    assert state_of(run.root) == before


def _refresh_until(root: Path, step: str) -> None:
    """A refresh that kills itself as ``step`` begins."""

    def on_step(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    refresh(Run(root), tiny(), RefreshConfig(force=True), quiet, on_step=on_step)


def _killed(root: Path, steps: tuple[str, ...], results) -> None:
    """Sends the signal that ended a refresh before each of ``steps``, and the run's state then."""
    for step in steps:
        pid = os.fork()
        if not pid:
            _refresh_until(root, step)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        results.send((os.WTERMSIG(status), state_of(root)))


def killed_before(run: Run, *steps: str) -> list[tuple[int, dict[str, str]]]:
    """(signal, state of the run) of one refresh after the other, each killed as one of ``steps`` begins. In a process
    of its own that has imported everything and done nothing: Arrow's threads do not outlive a fork."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    child = context.Process(target=_killed, args=(run.root, steps, its))
    child.start()
    its.close()
    results = [mine.recv() for _ in steps]
    child.join()
    return results


def test_a_kill_leaves_the_run_as_it_was_and_the_next_call_goes_on(run):
    append(run)
    before = state_of(run.root)
    for step, result in zip(STEPS, killed_before(run, *STEPS), strict=True):
        assert result == (signal.SIGKILL, before), step
    assert not finish_exchange(run.root) and state_of(run.root) == before
    assert run.manifest(COMPILED) and not run.doubt()
    append(run, 50, START + 500_000)  # comes too late for what is under way
    said: list[str] = []
    outcome = refresh(run, tiny(), RefreshConfig(force=True), said.append)
    assert (
        outcome.status == PUBLISHED and "going on" in said[0] and "refreshed retriever is there: nothing to do" in said
    )
    assert Features(run.features).log_number() == 400 and outcome.version == 2
    assert os.readlink(run.repository) == "model_repository.2" and not (run.root / WORK).exists()
    assert run.manifest(COMPILED) and not run.doubt() and run.has(FINAL) and run.manifest(RANKING)
    whole = popularity(Features(run.features).files(WHOLE), Features(run.features).item_count())
    served = load_retrieval(Features(run.features), tiny(), run.root, final=True)
    assert np.array_equal(served.popularity.numpy(), whole), "what is served has learned from everything"
    again = refresh(run, tiny(), RefreshConfig(force=True, min_events=60), quiet)
    assert again.status == NOTHING
    assert refresh(run, tiny(), RefreshConfig(force=True), quiet).status == PUBLISHED
    assert Features(run.features).log_number() == 450


def test_work_of_another_state_of_the_run_is_not_taken_up(run):
    append(run)

    def stop(name: str) -> None:
        if name == "judge":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        refresh(run, tiny(), RefreshConfig(force=True), quiet, on_step=stop)
    train_ranker(Features(run.features), tiny(), run.root, 6, quiet, quiet=True)
    evaluate(Features(run.features), tiny(), run.root, 6, quiet)
    train_final(Features(run.features), tiny(), run.root, quiet, quiet=True)
    said: list[str] = []
    refresh(run, tiny(), RefreshConfig(force=True), said.append)
    assert not any("is there" in line for line in said)


def test_what_cannot_be_refreshed_is_refused_with_what_to_do(run):
    (run.root / "query_search").mkdir()
    with pytest.raises(ValueError, match="expected appended events of items that the catalogue has"):
        store = LmdbStore(run.feature_store)
        store.append([Event("someone", "nothing known", "view", START)])
        store.close()
        refresh(run, tiny(), RefreshConfig(), quiet)
    with pytest.raises(ValueError, match=r"0 < share < 0\.5"):
        RefreshConfig(share=0.5)


# -- the replay ----------------------------------------------------------------------------------------
def test_a_refresh_within_a_replay_knows_no_event_of_the_future(served_root, tmp_path):
    """What is planted at the moment of a refresh or later changes no weight."""
    features = Features(served_root / "features")
    times = features.events()[TIME]
    until = int(times[len(times) * 9 // 10])
    copy = shutil.copytree(served_root / "features", tmp_path / "features")
    for file in (copy / WHOLE).glob("*.parquet"):
        frame = pd.read_parquet(file)
        late = [np.where(np.asarray(t) >= until, FIRST_ID, i) for i, t in zip(frame[ITEM], frame[TIME], strict=True)]
        pq.write_table(pq.read_table(file).set_column(1, ITEM, pa.array(late, pa.list_(pa.int64()))), file)
    before, after = events_of(features, WHOLE), events_of(Features(copy), WHOLE)
    assert before != after
    weights = []
    for number, data in enumerate((features, Features(copy))):
        (tmp_path / str(number)).mkdir()
        files = sequences_before(data, until, tmp_path / str(number))
        read = Counter()
        for file in files:
            for row in pq.read_table(file).to_pylist():
                read.update((row[USER], i, t) for i, t in zip(row[ITEM], row[TIME], strict=True))
        assert read == Counter({key: n for key, n in before.items() if key[2] < until})
        models = Models(data, tiny(), tmp_path, [RANKING], loaded=_models_of(features, served_root))
        renewed = Renewals(models, 1.0, 0, quiet).models_at(until)
        weights.append([*renewed.retriever.state_dict().values(), *renewed.ranker.state_dict().values()])
    learned = load_retrieval(features, tiny(), served_root).state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], learned, strict=False)), "it has gone on"


def _models_of(features: Features, root: Path):
    return load_retrieval(features, tiny(), root), load_ranker(features, tiny(), root)
