"""Answered requests are computed again offline: no skew where nothing is wrong, and a planted one is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from preprocessing.features import Features
from preprocessing.requests import recorded, requests_of
from serving.drift import Drift
from serving.runtime.pipeline import Pipeline
from serving.runtime.sampling import Sampling
from serving.runtime.stages import Row
from tests.support import untouched_store
from training.judge.parity import Offline, Tally, look
from training.presets import tiny
from vivace import contract
from vivace.impressions import samples
from vivace.impressions.queue import ImpressionOptions, ImpressionQueue
from vivace.run import Run
from vivace.store.lmdb_store import LmdbStore

ROWS, TOP_K = 40, 10


@pytest.fixture(scope="module")
def offline(root):
    return Offline(Features(root / "features"), tiny(), root)


def answer(root: Path, own: Path, repository: Path) -> tuple[Run, Tally]:
    """Answers users by their stored histories and by what they send, as the server's first and last stage log it."""
    run, folder = Run(own, root / "features"), own / "impressions"
    shutil.copytree(root / "compiled", run.compiled)
    store = LmdbStore(untouched_store(root), readonly=True)
    pipeline = Pipeline(repository, str(run.version()), run.shapes(), store)
    requests = requests_of(recorded(root))[: 2 * ROWS]
    rows = [Row(r.user, None, TOP_K, context={"device": "tv"}) for r in requests[:ROWS]]
    rows += [Row("", [*r.items, "unknown"], TOP_K, types=(*r.types, "click")) for r in requests[ROWS:]]
    writer = samples.SampleWriter(samples.SampleOptions(str(samples.folder_of(folder)), 1.0))
    sampling, queue = Sampling(writer, run.shapes(), str(run.version())), ImpressionQueue(
        ImpressionOptions(str(folder)), str(run.version())
    )  # fmt: skip
    known = pipeline.transform.known(rows)
    inputs, statuses = pipeline.transform(rows, known)
    ranked = pipeline.rank(inputs[0], pipeline.retrieve(inputs), pipeline.ranked)
    status = [s.encode() for s in statuses]
    items, scores, *_ = pipeline.respond(*ranked, np.full(len(rows), TOP_K), status)
    sampling.put("of many", rows, 0, known, inputs)
    viewers = [(row.user_id, "", b"", 1.0, "") for row in rows]
    queue.put(("of many", viewers, items, scores, status, 2.0, None, None))
    for each in (sampling, queue):
        each.close()
    store.close()
    return run, Tally()


def copy_of(root: Path, tmp_path: Path) -> Path:
    """The repository, to be changed."""
    return Path(shutil.copytree(root / "model_repository", tmp_path / "altered"))


def test_nothing_differs_where_nothing_is_wrong(root, offline, tmp_path):
    run, tally = answer(root, tmp_path / "shop", root / "model_repository")
    look(run, offline, tally)
    assert (tally.replayed, tally.skewed, tally.skipped) == (2 * ROWS, 0, 0), tally.examples
    assert not samples.files(samples.folder_of(run.root / "impressions"))  # what was replayed is gone
    assert look(run, offline, tally).replayed == 2 * ROWS


def test_a_category_table_that_is_shifted_is_found(root, offline, tmp_path):
    repository = copy_of(root, tmp_path)
    (path,) = (repository / contract.FEATURE_TRANSFORM).glob("*/transform.onnx")
    graph = onnx.load(path)
    (table,) = [a for node in graph.graph.node for a in node.attribute if a.name == "values_int64s"]
    values = list(table.ints)
    table.ints[:] = values[1:] + values[:1]
    onnx.save(graph, path)
    run, tally = answer(root, tmp_path / "shop", repository)
    look(run, offline, tally)
    assert tally.ids >= 2 * ROWS - 2 and "history, place 0: served" in tally.examples[-1]
    saved = json.loads((samples.folder_of(run.root / "impressions") / samples.RESULT).read_text())
    assert saved["ids"] == tally.ids


def test_items_that_are_named_otherwise_are_found_and_told_to_prometheus(root, offline, tmp_path):
    repository = copy_of(root, tmp_path)
    (path,) = (repository / contract.RESPONSE).glob("*/items.json")
    items = json.loads(path.read_text())
    path.write_text(json.dumps(items[1:] + items[:1]))
    run, tally = answer(root, tmp_path / "shop", repository)
    look(run, offline, tally)
    assert tally.ids == 0 and tally.answer == tally.replayed == 2 * ROWS
    drift = Drift(lambda: [(run.root / "model_repository.1", tmp_path / "nothing")])
    drift.look(0.0)
    families = {family.name: family for family in drift.collect()}
    assert [s.value for s in families["vivace_parity_skewed"].samples] == [0, 2 * ROWS]


def test_what_the_offline_path_cannot_know_is_not_compared(root, offline, tmp_path):
    run, tally = answer(root, tmp_path / "shop", root / "model_repository")
    ((path, taken),) = samples.read(samples.folder_of(run.root / "impressions"))
    other = [samples.Sample(**{**vars(s), "version": "9"}) for s in taken[:10]]
    changed = [samples.Sample(**{**vars(s), "changes": 3}) for s in taken[10:20]]
    waits = [samples.Sample(**{**vars(s), "id": f"{s.id} that nobody logged yet"}) for s in taken[20:30]]
    samples.write(path, [*other, *changed, *waits])
    look(run, offline, tally)
    assert (tally.replayed, tally.skewed, tally.skipped) == (0, 0, 20)
    assert [len(s) for _, s in samples.read(path.parent)] == [10]
