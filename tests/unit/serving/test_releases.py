"""A version is whole: published at once or not at all, refused where it is damaged, kept while a server holds it."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from serving import releases
from serving.releases import (
    CHECKSUMS,
    DamagedError,
    gone_back_to,
    held,
    held_from_the_start,
    keep,
    next_version,
    publishing,
    put_in_use,
    refusals,
    remember_refused,
    remember_served,
    served_before,
    verify,
    version_of,
)
from serving.start_checks import LEFTOVER, check_path, sweep_leftovers
from serving.wheel import ServerError
from vivace.cli.compile import what_follows

MODELS = ("feature_transform", "recommend")


def publish(repository: Path, content: str) -> int:
    with publishing(repository) as (folder, version):
        for model in MODELS:
            (folder / model / str(version)).mkdir(parents=True)
            (folder / model / "config.pbtxt").write_text(model)
            (folder / model / str(version) / "model.onnx").write_text(content)
    return version


def served(repository: Path) -> tuple[int, str]:
    """(version, content) of what the link names, which is as it was published."""
    release = repository.resolve()
    verify(release)
    (version,) = {p.name for p in release.glob("*/*") if p.name.isdigit()}
    (content,) = {(release / model / version / "model.onnx").read_text() for model in MODELS}
    return int(version), content


def test_each_version_is_a_folder_of_its_own_and_the_last_two_stay(tmp_path):
    repository = tmp_path / "model_repository"
    for n in range(1, 5):
        assert publish(repository, f"graph {n}") == n
        assert served(repository) == (n, f"graph {n}")
    assert [p.name for p in releases.releases(repository)] == ["model_repository.3", "model_repository.4"]


def test_what_a_server_holds_is_not_removed(tmp_path):
    repository = tmp_path / "model_repository"
    publish(repository, "one")
    first = repository.resolve()
    with held(first):
        for n in range(3):
            publish(repository, str(n))
        verify(first)
    publish(repository, "last")
    assert not first.exists()


def versions_of(repository: Path) -> list[int]:
    return [version_of(release) for release in releases.releases(repository)]


def test_as_many_old_versions_stay_as_one_says_and_those_that_are_needed(tmp_path):
    repository = tmp_path / "model_repository"
    publish(repository, "1")
    with pytest.raises(ValueError, match="expected 1 or more, got 0"):
        keep(repository, 0)
    assert keep(repository, 5) == []
    for n in range(2, 9):
        publish(repository, str(n))
    assert versions_of(repository) == [3, 4, 5, 6, 7, 8]  # 5 before the newest, from one publish to the next
    third, fourth = releases.releases(repository)[:2]
    put_in_use(fourth, repository)  # gone back to: the newest is not the one that is served
    remember_served(4, repository, 3)
    with held(releases.releases(repository)[2]):  # on trial
        assert keep(repository, 1) == [6]
    assert versions_of(repository) == [3, 4, 5, 7, 8]  # back from 4 it goes to 3
    assert gone_back_to(repository, 4) == 3 and third.exists()
    assert keep(repository, 1) == [5]
    put_in_use(releases.releases(repository)[-1], repository)
    assert keep(repository, 1) == [3]  # back from 8 it goes to 4, which was served before


STEPS = ["seal", "os.replace release", "symlink_to", "os.replace link"]


@pytest.mark.parametrize("step", STEPS)
def test_a_publish_that_is_cut_off_leaves_the_version_before(tmp_path, monkeypatch, step):
    repository = tmp_path / "model_repository"
    publish(repository, "one")
    calls = []

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    replace = os.replace

    def replace_cut(source, target):
        calls.append(target)
        if len(calls) == {"os.replace release": 1, "os.replace link": 2}.get(step, 0):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_cut)
        if step == "seal":
            patched.setattr(releases, "seal", cut)
        if step == "symlink_to":
            patched.setattr(Path, "symlink_to", cut)
        with pytest.raises(KeyboardInterrupt):
            publish(repository, "two")
    assert served(repository) == (1, "one")
    version = publish(repository, "three")
    assert version > 1 and served(repository) == (version, "three")


def test_a_block_that_fails_publishes_nothing(tmp_path):
    repository = tmp_path / "model_repository"
    with pytest.raises(ValueError, match="of the block"), publishing(repository):
        raise ValueError("of the block")
    assert list(tmp_path.iterdir()) == []


def flip(release: Path) -> None:
    path = release / "recommend" / "1" / "model.onnx"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def lose(release: Path) -> None:
    (release / "recommend" / "config.pbtxt").unlink()


def mix(release: Path) -> None:
    shutil.copytree(release / "recommend" / "1", release / "recommend" / "2")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "changed: recommend/1/model.onnx"),
        (lose, "missing: recommend/config.pbtxt"),
        (mix, "more than one version"),
    ],
)
def test_damage_is_refused_and_named(tmp_path, damage, said):
    repository = tmp_path / "model_repository"
    publish(repository, "one")
    damage(repository.resolve())
    with pytest.raises(DamagedError, match=f"{said}.*vivace compile"):
        verify(repository.resolve())


def test_profiles_that_are_added_later_are_no_damage(tmp_path):
    repository = tmp_path / "model_repository"
    publish(repository, "one")
    (repository / "recommend" / "configs").mkdir()
    (repository / "recommend" / "configs" / "tuned.pbtxt").write_text("tuned")
    verify(repository.resolve())


def test_a_plain_folder_of_before_becomes_the_version_it_holds(tmp_path):
    repository = tmp_path / "model_repository"
    (repository / "recommend" / "7").mkdir(parents=True)
    assert next_version(repository) == 8
    assert publish(repository, "eight") == 8
    assert (tmp_path / "model_repository.7" / "recommend" / "7").is_dir() and repository.is_symlink()
    assert not (tmp_path / "model_repository.7" / CHECKSUMS).exists()


def test_a_rollback_goes_to_what_was_served_before_and_never_to_what_was_rolled_back(tmp_path):
    repository = tmp_path / "model_repository"
    for version, before in ((2, 1), (1, 2), (3, 1)):  # 2 was published and taken back, then came 3
        remember_served(version, repository, before)
    assert served_before(repository) == [1, 3]
    remember_served(1, repository, 3)
    assert served_before(repository) == [1]


def test_a_copy_that_is_no_version_has_the_number_0(tmp_path):
    assert version_of(tmp_path / "model_repository") == 0 and version_of(tmp_path / "model_repository.12") == 12


def test_a_published_version_without_its_checksums_is_damaged(tmp_path):
    repository = tmp_path / "model_repository"
    with publishing(repository) as (folder, version):
        (folder / "response" / str(version)).mkdir(parents=True)
    verify(repository.resolve())
    (repository.resolve() / CHECKSUMS).unlink()
    with pytest.raises(DamagedError, match=r"missing: checksums.json.*vivace compile"):
        verify(repository.resolve())


def test_a_path_with_blanks_is_refused_before_anything_starts(tmp_path):
    check_path(tmp_path)
    with pytest.raises(ServerError, match="expected a path without blanks"):
        check_path(tmp_path / "my run")


def test_a_start_never_sweeps_what_another_start_has_just_made(tmp_path, monkeypatch):
    """Two starts at once, and a third that sweeps all the while: a folder that is held is there to its end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    over, lost = threading.Event(), list[str]()

    def sweep() -> None:
        while not over.is_set():
            sweep_leftovers()

    def make() -> None:
        for _ in range(150):
            folder = Path(tempfile.mkdtemp(prefix=LEFTOVER))
            with held_from_the_start(folder):
                (folder / "model.py").touch()
                time.sleep(0.001)
                lost.extend([] if (folder / "model.py").exists() else [folder.name])
            shutil.rmtree(folder, ignore_errors=True)

    threads = [threading.Thread(target=sweep), *(threading.Thread(target=make) for _ in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    over.set()
    threads[0].join()
    assert lost == []


def test_a_version_that_was_not_taken_is_not_to_be_published_again(tmp_path):
    repository = tmp_path / "model_repository"
    for content in ("1", "2"):
        publish(repository, content)
    assert what_follows(2, {1}, refusals(repository).get(2, "")) == ("", "publish")
    remember_refused(2, repository, "refused, as it answers all alike")
    said, command = what_follows(2, {1}, refusals(repository).get(2, ""))
    assert "version 2" in said and said.endswith("did not take it: refused, as it answers all alike")
    assert command == "train" and versions_of(repository) == [1, 2]
    assert what_follows(2, set(), refusals(repository).get(2, "")) == ("", "serve")
    remember_refused(2, repository, "")
    assert refusals(repository) == {} and what_follows(2, {2}, "") == ("version 2 is served already", "")
    (tmp_path / "model_repository.refused.json").write_text("[")
    assert refusals(repository) == {}
