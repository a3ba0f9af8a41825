"""The prepared artifact does not depend on how it was made, and resumes."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from preprocessing.events import user_hash
from preprocessing.features import Features
from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.shop import Shop, ShopConfig
from preprocessing.splits import SplitConfig
from preprocessing.workflow import VocabularyConfig, load_workflow
from training.data.counters import popularity
from vivace import contract
from vivace.manifest import BusyError, exclusive

SOURCE = Shop(ShopConfig(users=150, items=80, events=3000, seed=9))


def _raw_sequences(folder) -> dict[str, list[str]]:
    features = Features(folder / "features")
    names = features.items()[contract.ITEM].tolist()
    rows = pd.concat(pd.read_parquet(f) for f in features.files("test"))
    return {
        u: [names[i - contract.FIRST_ID] for i in h]
        for u, h in zip(rows[contract.USER], rows[contract.ITEM], strict=True)
    }


def _stream(folder) -> list[tuple[str, int, int]]:
    """(raw item, hash of the user, time) of each event, in the order of the file."""
    features = Features(folder / "features")
    names = [""] * contract.FIRST_ID + features.items()[contract.ITEM].tolist()
    stream = features.events()
    columns = (stream[name].tolist() for name in (contract.ITEM, contract.USER, contract.TIME))
    return [(names[item], user, time_ms) for item, user, time_ms in zip(*columns, strict=True)]


def test_partitions_and_dask_workers_change_nothing(tmp_path):
    configs = {
        "one": PrepareConfig(partitions=1),
        "five": PrepareConfig(partitions=5),
        "dask": PrepareConfig(partitions=4, workers=2),
    }
    found, streams = {}, {}
    for name, config in configs.items():
        prepare(SOURCE, config, tmp_path / name, 0, lambda _: None)
        found[name] = _raw_sequences(tmp_path / name)
        streams[name] = _stream(tmp_path / name)
    assert found["one"] == found["five"] == found["dask"]
    assert len(found["one"]) > 100
    assert streams["one"] == streams["five"] == streams["dask"]


def _log() -> pd.DataFrame:
    log = pd.concat(x.rows for x in SOURCE.interactions())
    return log.drop_duplicates([contract.USER, contract.ITEM, contract.TIME, contract.EVENT])


@pytest.mark.parametrize("kind", ["leave-one-out", "time"])
def test_the_stream_holds_every_event_of_the_log_in_order_of_time(tmp_path, kind):
    config = PrepareConfig(SplitConfig(kind), VocabularyConfig(max_size=20 + contract.FIRST_ID), partitions=3)
    prepare(SOURCE, config, tmp_path, 0, lambda _: None)
    log, stream, items = _log(), _stream(tmp_path), set(Features(tmp_path / "features").items()[contract.ITEM])
    assert [time_ms for _, _, time_ms in stream] == sorted(log[contract.TIME].tolist())
    names = [name if name in items else "" for name in log[contract.ITEM]]
    users = user_hash(log[contract.USER].to_numpy())
    assert "" in names and sorted(stream) == sorted(
        zip(names, users.tolist(), log[contract.TIME].tolist(), strict=True)
    )


@pytest.mark.parametrize("kind", ["leave-one-out", "time"])
def test_a_request_has_its_own_moment(tmp_path, kind):
    prepare(SOURCE, PrepareConfig(SplitConfig(kind), partitions=2), tmp_path, 0, lambda _: None)
    features = Features(tmp_path / "features")
    columns = (features.events()[name].tolist() for name in (contract.ITEM, contract.USER, contract.TIME))
    stream = set(zip(*columns, strict=True))
    for part in ("valid", "test"):
        rows = pd.concat(pd.read_parquet(f) for f in features.files(part))
        moments = rows[contract.TARGET_TIME].tolist()
        assert all(times[-1] <= moment for times, moment in zip(rows[contract.TIME], moments, strict=True))
        users = user_hash(rows[contract.USER].to_numpy()).tolist()
        assert len(rows) and set(zip(rows[contract.TARGET].tolist(), users, moments, strict=True)) <= stream


def test_leave_one_out_holds_back_the_last_two_events(tmp_path):
    prepare(SOURCE, PrepareConfig(partitions=2), tmp_path, 0, lambda _: None)
    log = pd.concat(x.rows for x in SOURCE.interactions()).sort_values(
        [contract.USER, contract.TIME, contract.SOURCE_ROW]
    )
    expected = {u: g[contract.ITEM].tolist() for u, g in log.groupby(contract.USER)}
    vocabulary = set(Features(tmp_path / "features").items()[contract.ITEM])
    for user, history in _raw_sequences(tmp_path).items():
        if set(expected[user]) <= vocabulary:
            assert history == expected[user][:-1]


def test_vocabulary_limits(tmp_path):
    config = PrepareConfig(SplitConfig(), VocabularyConfig(max_size=20 + contract.FIRST_ID), partitions=2)
    results = prepare(SOURCE, config, tmp_path, 0, lambda _: None)["results"]
    assert results["items_in_vocabulary"] == 20
    with pytest.raises(ValueError, match="only one"):
        VocabularyConfig(freq_threshold=2, max_size=10)


def test_resume_and_lock(tmp_path):
    said: list[str] = []
    first = prepare(SOURCE, PrepareConfig(partitions=2), tmp_path, 0, said.append)
    again = prepare(SOURCE, PrepareConfig(partitions=2), tmp_path, 0, said.append)
    assert again == first and "nothing to do" in said[-1]
    assert {"config", "seed", "inputs", "versions", "commit"} <= set(first)
    with exclusive(tmp_path), pytest.raises(BusyError, match="another vivace"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):  # the lock went with its holder
        pass


def test_features_of_another_version_are_named(tmp_path):
    manifest = prepare(SOURCE, PrepareConfig(partitions=1), tmp_path, 0, lambda _: None)
    del manifest["config"]["layout"]
    (tmp_path / "features" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="run 'vivace prepare' again"):
        Features(tmp_path / "features").files("train")
    with pytest.raises(ValueError, match="run 'vivace prepare' again"):
        Features(tmp_path / "features").events()


def test_items_without_a_training_event_are_in_the_vocabulary(tmp_path):
    counts, found = {}, {}
    for new_items in (True, False):
        config = PrepareConfig(vocabulary=VocabularyConfig(new_items=new_items), partitions=2)
        prepare(SOURCE, config, tmp_path / str(new_items), 0, lambda _: None)
        features = Features(tmp_path / str(new_items) / "features")
        found[new_items] = features.items()[contract.ITEM].tolist()
        counts[new_items] = popularity(features.files("train"), features.item_count())[contract.FIRST_ID :]
    assert len(found[True]) == 80 > len(found[False]) and (counts[False] > 0).all()
    assert found[True][: len(found[False])] == found[False] and (counts[True][len(found[False]) :] == 0).all()


def test_a_saved_workflow_is_loaded_only_as_it_was_saved(tmp_path):
    """It holds a pickle: who can write it would run code."""
    prepare(SOURCE, PrepareConfig(partitions=1), tmp_path, 0, lambda _: None)
    folder = tmp_path / "features" / "workflow"
    assert load_workflow(folder).output_node is not None
    (pickled,) = folder.glob("*.pkl")
    content = pickled.read_bytes()
    ran = tmp_path / "ran"
    pickled.write_bytes(f"cposix\nsystem\n(S'touch {ran}'\ntR.".encode())
    with pytest.raises(ValueError, match=rf"not loaded, as {pickled.name} changed since .*vivace prepare' again"):
        load_workflow(folder)
    pickled.write_bytes(content)
    (folder / "more.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"more\.pkl changed"):
        load_workflow(folder)
    (folder / "more.pkl").unlink()
    load_workflow(folder)
    manifest = tmp_path / "features" / "manifest.json"
    record = json.loads(manifest.read_text())
    del record["results"]["checksums"]
    manifest.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="has no checksums of this workflow"):
        load_workflow(folder)
    assert not ran.exists()
