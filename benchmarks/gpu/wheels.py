"""Wheels for a Python that is not this one: downloaded by pip with pinned versions and hashes, laid out as files."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PINNED = Path(__file__).with_name("wheels.txt")
GLIBC = ("2_35", "2_28", "2_27", "2_24", "2_17")  # pip matches a platform by its exact name
INSTALLED = re.compile(r"^[^/]+\.data/(purelib|platlib)/")
STUBS = "pytriton/tritonserver/python_backend_stubs/"


@dataclass(frozen=True)
class Content:
    """One file of a bundle."""

    name: str
    data: bytes
    executable: bool = False


def pinned(names: list[str]) -> dict[str, str]:
    """The line with its hashes, as pip reads it, of each ``name==version``. Raises ValueError where one has none."""
    joined = PINNED.read_text().replace("\\\n", " ")
    lines = {line.split()[0]: line for line in joined.splitlines() if line and not line.startswith("#")}
    missing = [name for name in names if name not in lines]
    if missing:
        raise ValueError(f"gpu-pack: no hash of {', '.join(missing)} in {PINNED.name}")
    return {name: lines[name] for name in names}


def download(names: list[str], python: str, folder: Path) -> list[Path]:
    """Wheels of ``names`` for ``python`` ("3.12"), kept in ``folder/<python>``."""
    folder = folder / python
    folder.mkdir(parents=True, exist_ok=True)
    wheels = []
    for name, line in pinned(names).items():
        project, version = name.split("==")
        pattern = f"{project.replace('-', '_')}-{version}-*.whl"
        there = [w for w in folder.glob(pattern) if hashlib.sha256(w.read_bytes()).hexdigest() in line]
        if there:
            wheels.append(there[0])
            continue
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirement:
            requirement.write(line + "\n")
            requirement.flush()
            command = [
                sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
                "--require-hashes", "--only-binary=:all:", "--python-version", python, "--implementation", "cp",
                *(f"--platform=manylinux_{version}_x86_64" for version in GLIBC), "--platform=manylinux2014_x86_64",
                "--dest", str(folder), "-r", requirement.name,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"gpu-pack: pip could not fetch {name} for Python {python}: {done.stderr.strip()[-500:]}")
        wheels += folder.glob(pattern)
    return wheels


def files(wheel: Path, leave_out: list[str]) -> Iterator[Content]:
    """What ``pip install --no-deps --target`` would write of it, but for what matches ``leave_out``, a pattern of a
    file or of a folder."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = INSTALLED.sub("", info.filename)
            if info.is_dir() or ".data/" in name or _matches(name, leave_out):
                continue
            yield Content(name, archive.read(info), bool(info.external_attr >> 16 & 0o100))


def _matches(name: str, patterns: list[str]) -> bool:
    folders = name.split("/")
    parts = ["/".join(folders[: n + 1]) for n in range(len(folders))]
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in patterns)


def for_python(leave_out: list[str], python: str) -> list[str]:
    """Patterns written for Python 3.12, where Triton's stub of another Python is to be kept in its place."""
    stubs = {pattern for pattern in leave_out if pattern.startswith(STUBS)}
    others = {STUBS + version for version in ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13")} - {STUBS + python}
    return [pattern for pattern in leave_out if pattern not in stubs] + (sorted(others) if stubs else [])
