"""Whole versions of a model repository: each a folder of its own that is made once, checked by its checksums, and put
in use by one exchange of a link.

    artifacts/<name>/model_repository      a link to the version in use
    artifacts/<name>/model_repository.3    version 3: every model's configuration and its folder ``3``, CHECKSUMS

A server serves the folder that the link named when it started, whatever is published since: a worker that dies comes
back as the version of its neighbours. A folder that a server holds is not removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vivace.contract import ENSEMBLE
from vivace.manifest import write_json

CHECKSUMS, HELD = "checksums.json", ".held"
MEND = ". 'vivace compile' makes it anew; 'vivace rollback' serves the version before"
KEPT = 1  # versions on disk before the newest, unless ``keep`` says otherwise; more only while they are needed
HISTORY = 20  # served versions that are remembered


class DamagedError(ValueError):
    """A version is not what was published."""


def version_of(release: Path) -> int:
    """0 for a folder that was not published as a version, such as a copy of one."""
    number = release.name.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def releases(repository: Path) -> list[Path]:
    """Folders of the versions there are, oldest first."""
    pattern = re.compile(re.escape(repository.name) + r"\.\d+")
    return sorted(
        (p for p in repository.parent.glob(f"{repository.name}.*") if pattern.fullmatch(p.name)), key=version_of
    )


def card_of(release: Path) -> dict[str, Any]:
    """The model card of a version; {} where it has none."""
    for path in release.glob(f"{ENSEMBLE}/*/model_card.json"):
        card: dict[str, Any] = json.loads(path.read_text())
        return card
    return {}


def next_version(repository: Path) -> int:
    """The version that is published next."""
    inner = [int(p.name) for p in repository.glob("*/*") if p.is_dir() and p.name.isdigit()]
    return max([version_of(p) for p in releases(repository)] + inner, default=0) + 1


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sealed(release: Path) -> Iterator[Path]:
    """Files that the checksums are of: all but profiles that are added and dropped later (``vivace tune``)."""
    for path in sorted(release.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS and "__pycache__" not in path.parts:
            yield path


def seal(release: Path) -> None:
    """Writes the checksums of everything in ``release``."""
    sums = {str(path.relative_to(release)): _digest(path) for path in _sealed(release)}
    (release / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def signatures(release: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time and inode of each file that has a checksum: where they are the same, nothing was written there."""
    statuses = {path: path.stat() for path in _sealed(release) if path.name != HELD}
    return {str(path.relative_to(release)): (s.st_size, s.st_mtime_ns, s.st_ino) for path, s in statuses.items()}


def verify(release: Path) -> None:
    """Raises DamagedError that names what is missing or changed since it was published, or a model whose version is not
    that of the others. A repository that was not published as a version of its own has no checksums and is believed."""
    numbers = {p.name for p in release.glob("*/*") if p.is_dir() and p.name.isdigit()}
    file = release / CHECKSUMS
    if not file.exists():
        if (release / HELD).exists():  # it was published
            raise DamagedError(f"model repository {release}: not as it was published; missing: {CHECKSUMS}{MEND}")
        return
    sums = json.loads(file.read_text())
    missing = sorted(name for name in sums if not (release / name).exists())
    changed = sorted(name for name in sums if name not in missing and _digest(release / name) != sums[name])
    if missing or changed or len(numbers) != 1:
        faults = [f"missing: {', '.join(missing[:5])}"] * bool(missing)
        faults += [f"changed: {', '.join(changed[:5])}"] * bool(changed)
        faults += [f"more than one version: {', '.join(sorted(numbers))}"] * (len(numbers) > 1)
        raise DamagedError(f"model repository {release}: not as it was published; {'; '.join(faults)}{MEND}")


def _adopt(repository: Path) -> None:
    """A repository of before there were versions, a plain folder, becomes the version that it holds."""
    if repository.is_symlink() or not repository.is_dir():
        return
    target = repository.with_name(f"{repository.name}.{max(next_version(repository) - 1, 1)}")
    if target.exists():
        shutil.rmtree(repository)
    else:
        repository.rename(target)


@contextlib.contextmanager
def held(release: Path) -> Iterator[None]:
    """While a server serves ``release``: nobody removes it. The kernel lets go with the process, however it ends. A
    container sees its release read-only, and the file that it holds was made with the release. A folder without one
    that cannot be written to is not held: nobody could remove it either."""
    try:
        handle = (release / HELD).open("a")
    except OSError:
        try:
            handle = (release / HELD).open("r")
        except OSError:
            yield
            return
    with handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def held_from_the_start(folder: Path) -> Iterator[None]:
    """The same of a folder that was made a moment ago: there is no moment at which another start, which sweeps what
    nobody holds, sees its file free."""
    unseen = folder / f"{HELD}.new"
    with unseen.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        unseen.rename(folder / HELD)
        yield


def is_free(release: Path) -> bool:
    """Whether no server holds it."""
    with (release / HELD).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextlib.contextmanager
def publishing(repository: Path) -> Iterator[tuple[Path, int]]:
    """(folder to fill, its version): what is in it when the block ends is published whole; where the block fails,
    nothing is. Old versions go (``tidy``)."""
    _adopt(repository)
    version = next_version(repository)
    partial = repository.with_name(f".{repository.name}.{version}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial, version
        seal(partial)
        (partial / HELD).touch()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    release = repository.with_name(f"{repository.name}.{version}")
    os.replace(partial, release)
    _publish_link(release, repository)


def take_over(made: Path, repository: Path) -> None:
    """Puts a version in use that was published in another folder; goes on where it was stopped."""
    _adopt(repository)
    release = repository.with_name(made.name)
    if made.exists():
        os.replace(made, release)
    _publish_link(release, repository)


def put_in_use(release: Path, repository: Path) -> None:
    """What is served next is ``release``: the link names it."""
    link = repository.with_name(f".{repository.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(release.name)
    os.replace(link, repository)


def _history(repository: Path) -> Path:
    return repository.with_name(f"{repository.name}.served.json")


def served_before(repository: Path) -> list[int]:
    """Versions that servers have taken over, the last one last; what cannot be read says nothing."""
    try:
        return [int(version) for version in json.loads(_history(repository).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def remember_served(version: int, repository: Path, before: int) -> None:
    """That servers serve ``version`` in the place of ``before``. What was served after a version that is gone back to
    is forgotten: a later rollback does not bring it back."""
    history = served_before(repository)
    history = history if history[-1:] == [before] else [*history, before]
    history = history[: history.index(version) + 1] if version in history else [*history, version]
    write_json(_history(repository), history[-HISTORY:])


def _not_taken(repository: Path) -> Path:
    return repository.with_name(f"{repository.name}.refused.json")


def remember_refused(version: int, repository: Path, why: str) -> None:
    """That a server was to serve ``version`` and did not, and its words; "" forgets it."""
    refused = {int(v): words for v, words in refusals(repository).items() if v != version}
    write_json(_not_taken(repository), refused | ({version: why} if why else {}))


def refusals(repository: Path) -> dict[int, str]:
    """Versions that a server did not take, and why; what cannot be read says nothing."""
    try:
        return {int(version): str(why) for version, why in json.loads(_not_taken(repository).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def newest_is_whole(repository: Path) -> bool:
    """Whether the newest version is as it was published; also where there is none."""
    try:
        for newest in releases(repository)[-1:]:
            verify(newest)
    except DamagedError:
        return False
    return True


def in_use(repository: Path) -> list[Path]:
    """Versions that a server holds, oldest first."""
    return [release for release in releases(repository) if (release / HELD).exists() and not is_free(release)]


def gone_back_to(repository: Path, current: int) -> int:
    """The version to go back to from ``current``: what was served before it, or else the newest older one there is; 0
    for none."""
    there, history = [version_of(release) for release in releases(repository)], served_before(repository)
    history = history[: history.index(current)] if current in history else history
    earlier = [v for v in history if v in there and v != current][-1:] or [v for v in there if v < current][-1:]
    return earlier[0] if earlier else 0


def _keep_file(repository: Path) -> Path:
    return repository.with_name(f"{repository.name}.keep.json")


def kept(repository: Path) -> int:
    """How many versions before the newest stay on disk; what cannot be read says KEPT."""
    try:
        return max(int(json.loads(_keep_file(repository).read_text())), 1)
    except (OSError, ValueError, TypeError):
        return KEPT


def keep(repository: Path, count: int) -> list[int]:
    """From now on ``count`` versions before the newest stay on disk; removes the others (``tidy``). Raises ValueError
    for none, as there would be nothing to go back to."""
    if count < 1:
        raise ValueError(f"--keep: expected 1 or more, got {count}: without an older version there is no way back")
    write_json(_keep_file(repository), count)
    return tidy(repository)


def tidy(repository: Path) -> list[int]:
    """Removes old versions, all but the ``kept`` newest before the newest; the removed ones. What the link names, what
    a server holds, as the one it serves or has on trial, and what a rollback goes back to stay."""
    current = version_of(repository.resolve())
    needed = {current, gone_back_to(repository, current)}
    removed = []
    for old in releases(repository)[: -kept(repository) - 1]:
        if version_of(old) not in needed and is_free(old):
            shutil.rmtree(old)
            removed.append(version_of(old))
    return removed


def _publish_link(release: Path, repository: Path) -> None:
    """Exchanges the link, and removes old versions."""
    put_in_use(release, repository)
    tidy(repository)
