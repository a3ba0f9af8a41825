"""Artifacts: one folder a step under ``artifacts/<name>/``, each with a manifest that says how it was made.

A step whose manifest matches its configuration, seed and inputs is not run again. The manifest is written last, so a
step that was interrupted has none and runs anew (training goes on from its own checkpoint).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vivace import machine

Progress = Callable[[str], None]  # where a step says in one line what it does
CHECKOUT = Path(__file__).resolve().parent.parent
MANIFEST = "manifest.json"
COMMIT = ".commit"  # of a copy that is no checkout: the commit it is of
OWNER = "owner.key"  # whose a folder is that is not finished
RECORDED = (
    "nvtabular", "merlin-models", "merlin-dataloader", "torch", "onnx", "onnxruntime", "numpy", "pandas",
    "nvidia-pytriton",
)  # fmt: skip


def commit() -> str:
    """Commit of the checkout, with "+changes" if the tree is not clean; of a copy what it says; else "unknown"."""
    with contextlib.suppress(FileNotFoundError):
        return (CHECKOUT / COMMIT).read_text().strip()
    run = lambda *a: subprocess.run(["git", "-C", str(CHECKOUT), *a], capture_output=True, text=True)  # noqa: E731
    try:
        head = run("rev-parse", "--short=12", "HEAD")
        dirty = run("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def versions() -> dict[str, str]:
    by_package = {"python": platform.python_version()}
    for name in RECORDED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            by_package[name] = metadata.version(name)
    return by_package


def environment() -> dict[str, Any]:
    """What every measured figure is recorded with: commit, date (UTC), processor, cores, GPU and versions."""
    name, extensions = machine.cpu()
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": name,
        "cpu_extensions": extensions,
        "cores": machine.cores(),
        "gpu": machine.gpu(),
        "versions": versions(),
    }


def plain(value: Any) -> Any:
    """``value`` as JSON would give it back, so that two configs can be compared."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return json.loads(json.dumps(value, default=str))


def finite(value: Any) -> Any:
    """``value``, a tree of JSON, with None for numbers that JSON does not know (NaN and the infinities)."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_files(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents, read in blocks."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]


class BusyError(RuntimeError):
    """Another process is working on the same artifacts."""


@dataclass
class Step:
    """One step's folder and what determines its content."""

    folder: Path
    name: str
    config: Any
    seed: int
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of data and of earlier steps

    @property
    def manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def key(self) -> str:
        return digest({"step": self.name, "config": plain(self.config), "seed": self.seed, "inputs": self.inputs})

    def done(self) -> bool:
        manifest = self.manifest
        return manifest is not None and manifest["key"] == self.key

    def finished(self, say: Progress, what: str) -> dict[str, Any] | None:
        """The manifest of a step that is done, said in a line; else None."""
        manifest = self.manifest
        if manifest is None or manifest["key"] != self.key:
            return None
        say(f"{what}: nothing to do")
        return manifest

    def finish(self, seconds: float, **results: Any) -> dict[str, Any]:
        """Writes the manifest; from here on the step counts as done."""
        manifest = {
            "step": self.name,
            "key": self.key,
            "config": plain(self.config),
            "seed": self.seed,
            "inputs": self.inputs,
            "versions": versions(),
            "commit": commit(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "results": plain(results),
        }
        manifest = finite(manifest)
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def reset(self) -> None:
        """Makes the folder and forgets an earlier manifest: from here on the step counts as not done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def keep_only_own(self) -> None:
        """The same, and empties the folder if another configuration, seed or data left something there: nothing of it
        is taken up."""
        mark = self.folder / OWNER
        if self.folder.exists() and not (mark.exists() and mark.read_text() == self.key):
            shutil.rmtree(self.folder)
        self.reset()
        mark.write_text(self.key)


def read_manifest(folder: Path, made_by: str) -> dict[str, Any]:
    """Manifest of an earlier step; raises FileNotFoundError that names the command to run."""
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{folder.name}: not there yet ({path}); run '{made_by}' first")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def write_text(path: Path, text: str) -> None:
    """Replaces a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file whole or not at all; NaN and the infinities become null, which every reader of JSON knows."""
    write_text(path, json.dumps(finite(plain(value)), indent=2, allow_nan=False, ensure_ascii=False))


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder`` to build in, which takes its place at the end of the block. Where the block
    raises, ``folder`` stays as it was, and ``<folder>.partial`` holds what was built."""
    fresh, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".old"))
    if old.exists() and not folder.exists():  # stopped between the two renames
        old.rename(folder)
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Holds ``artifacts/<name>`` for one writer. The kernel drops the lock with the process, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{root}: another vivace is working on these artifacts; wait for it or use --name"
            ) from None
        yield
