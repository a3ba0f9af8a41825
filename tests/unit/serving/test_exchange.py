"""An exchange that was begun is finished, wherever it is killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

from serving.exchange import WORK, begin_exchange, finish_exchange, finish_exchange_of
from serving.releases import held, in_use, releases

PARTS = ("features", "retrieval", "final")


def _run(root: Path) -> Path:
    """A run of old parts and versions 1 and 2, with the work of a refresh beside it."""
    for folder, content in ((root, "old"), (root / WORK, "new")):
        for name in (*PARTS, *["ranking_control"] * (content == "old")):
            (folder / name).mkdir(parents=True)
            (folder / name / "content").write_text(content)
    for number in (1, 2):
        (root / f"model_repository.{number}").mkdir()
        (root / f"model_repository.{number}" / ".held").touch()
    (root / "model_repository").symlink_to("model_repository.2")
    (root / WORK / "model_repository.3" / "recommend").mkdir(parents=True)
    (root / WORK / "model_repository.3" / ".held").touch()
    return root


def _exchanged(root: Path) -> bool:
    new = all((root / name / "content").read_text() == "new" for name in PARTS)
    left = {p.name for p in root.iterdir()} == {*PARTS, "model_repository", "model_repository.2", "model_repository.3"}
    return new and left and os.readlink(root / "model_repository") == "model_repository.3"


def _finish_until(root: Path, calls: int) -> None:
    """``finish_exchange`` in a process that is killed before its rename or removal number ``calls``."""
    left = [calls]

    def counted(call):
        def wrapped(*arguments, **named):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*arguments, **named)

        return wrapped

    for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "symlink_to"), (os, "replace"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name)))
    finish_exchange(root)


def test_a_killed_exchange_is_finished_by_the_next_who_opens_the_run(tmp_path):
    killed, calls = True, 0
    while killed:
        root = _run(tmp_path / str(calls) / "shop")
        begin_exchange(root, PARTS, ["ranking_control"], 3)
        child = multiprocessing.get_context("fork").Process(target=_finish_until, args=(root, calls))
        child.start()
        child.join(60)
        killed = child.exitcode == -signal.SIGKILL
        done = not (root / WORK / "exchange.json").exists()
        finish_exchange_of(root)
        (root / ".lock").unlink(missing_ok=True)
        if done:  # what was killed after it was done leaves its work to the next refresh
            shutil.rmtree(root / WORK, ignore_errors=True)
        assert _exchanged(root), calls
        calls += 1
    assert calls > 12 and not finish_exchange(root)


def test_nothing_happens_before_it_is_begun_and_a_served_version_stays(tmp_path):
    root = _run(tmp_path / "shop")
    assert not finish_exchange(root) and (root / "features" / "content").read_text() == "old"
    with held(root / "model_repository.1"):
        assert in_use(root / "model_repository") == [root / "model_repository.1"]
        begin_exchange(root, PARTS, [], 3)
        assert finish_exchange(root)
        assert [p.name for p in releases(root / "model_repository")] == [f"model_repository.{n}" for n in (1, 2, 3)]
