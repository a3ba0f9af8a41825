"""``make gpu-pack``: what a bare machine with a GPU needs, in pieces that are small enough to be carried there.

    python -m benchmarks.gpu.pack [--with onnxruntime-gpu,tensorrt-rtx] [--data ml-1m-benchmark,beauty] [--limit-mib 60]

A *bundle* is one ``tar.xz``: the code, prepared runs, the wheels of one purpose. A *piece* is a folder of at most
``--limit-mib``: bundles, or parts of one, and ``piece.json`` with their sizes and hashes. ``unpack.py``, copied beside
them, needs nothing but Python. Prepared runs hold the data sets they were made of, with their licences: packs stay
where git ignores them.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu import wheels
from benchmarks.gpu.wheels import Content
from preprocessing.features import Features
from vivace.manifest import CHECKOUT, COMMIT, commit as commit_of_checkout
from vivace.run import Run

PIECES = Path(__file__).with_name("pieces.toml")
UNPACK = CHECKOUT / "deploy" / "gpu" / "unpack.py"
BASE = ("code", "runs", "served")  # bundles of the piece "base"
SMALL_SHOP = {"users": 700, "items": 300, "events": 12_000}
NOT_PACKED = ("workflow", "item_workflow")  # pickles that only NVTabular reads
WORDS = "categories"  # in them: tables of raw values, which recorded requests are made with
XZ = ("xz", "-T0", "-c", "--x86")  # x86: of machine code, jumps as absolute addresses
MIB = 2**20


@dataclass(frozen=True)
class Bundle:
    name: str
    path: Path
    holds: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Part:
    """Bytes ``start`` to ``end`` of a bundle; number ``part`` of ``parts``, from 1."""

    bundle: str
    part: int
    start: int
    end: int


def cut(sizes: dict[str, int], limit: int) -> list[list[Part]]:
    """Pieces of at most ``limit`` bytes, each full before the next begins."""
    pieces: list[list[Part]] = [[]]
    room = limit
    for bundle, size in sizes.items():
        start, part = 0, 1
        while start < size:
            if room == 0:
                pieces.append([])
                room = limit
            end = min(size, start + room)
            pieces[-1].append(Part(bundle, part, start, end))
            room -= end - start
            start, part = end, part + 1
    return pieces


# -- what a bundle holds ---------------------------------------------------------------------------------
def code(commit: str) -> list[Content]:
    """Every file that git tracks, as it is in the checkout, and which ``commit`` that is."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    paths = [CHECKOUT / name for name in listed.split("\0") if name]
    files = [
        Content(str(p.relative_to(CHECKOUT)), p.read_bytes(), bool(p.stat().st_mode & 0o100))
        for p in paths
        if p.exists()
    ]
    return [*files, Content(COMMIT, commit.encode())]


def is_current(run: Run) -> bool:
    """Whether a run's features are there, and of this version's layout."""
    try:
        return bool(Features(run.features).files("train"))
    except (ValueError, FileNotFoundError):
        return False


def prepared(data: str, artifacts: Path) -> list[Content]:
    """Features and feature store of a run of ``data``, prepared in ``artifacts`` if it is not there."""
    run = Run(artifacts / data)
    if not is_current(run):
        from vivace.cli.prepare import prepare

        size: dict[str, Any] = SMALL_SHOP if data == "shop" else {}
        prepare(data=data, name=data, artifacts=artifacts, seed=7, **size)
    kept = [p for p in sorted(run.root.rglob("*")) if p.is_file() and not p.name.endswith("lock.mdb")]
    folders = (run.features, run.feature_store)
    names = [(p, p.relative_to(artifacts)) for p in kept if any(p.is_relative_to(f) for f in folders)]
    return [Content(str(n), p.read_bytes()) for p, n in names if WORDS in n.parts or not set(n.parts) & set(NOT_PACKED)]


def packages(section: dict[str, Any], python: str, cache: Path) -> list[Content]:
    """Wheels and files of a section of pieces.toml as a folder "site", and those of its ``workers`` as another."""
    folders = {"site": section}
    if "workers" in section:
        folders[section["workers"]["folder"]] = section["workers"]
    contents = []
    for folder, part in folders.items():
        contents += [Content(f"{folder}/{name}", text.encode()) for name, text in part.get("files", {}).items()]
        leave_out = wheels.for_python(part["leave_out"], python)
        for wheel in wheels.download(part["wheels"], python, cache):
            contents += [Content(f"{folder}/{c.name}", c.data, c.executable) for c in wheels.files(wheel, leave_out)]
    return contents


# -- bundles and pieces ----------------------------------------------------------------------------------
def bundle(name: str, holds: str, contents: Iterable[Content], cache: Path, level: int = 6) -> Bundle:
    """``contents`` as one tar.xz, compressed at xz's ``level``; taken from ``cache`` if that holds the same."""
    contents = sorted(contents, key=lambda c: c.name)
    key = hashlib.sha256(f"{XZ} {level}".encode())
    for c in contents:
        key.update(f"{c.name}\0{c.executable}\0{hashlib.sha256(c.data).hexdigest()}\n".encode())
    path = cache / f"{name}-{key.hexdigest()[:16]}.tar.xz"
    if not path.exists():
        print(f"gpu-pack: {name}: compressing {sum(len(c.data) for c in contents) / MIB:.0f} MiB", flush=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as out:
            xz = subprocess.Popen([*XZ, f"--lzma2=preset={level}"], stdin=subprocess.PIPE, stdout=out)
            assert xz.stdin is not None
            with xz.stdin, tarfile.open(fileobj=xz.stdin, mode="w|") as tar:
                for c in contents:
                    entry = tarfile.TarInfo(c.name)
                    entry.size, entry.mode = len(c.data), 0o755 if c.executable else 0o644
                    tar.addfile(entry, io.BytesIO(c.data))
            if xz.wait():
                raise ValueError(f"gpu-pack: xz stopped with {xz.returncode}")
        for old in cache.glob(f"{name}-*.tar.xz"):
            old.unlink()
        partial.rename(path)
    return Bundle(name, path, holds)


def write_pieces(group: str, bundles: list[Bundle], limit: int, out: Path) -> list[dict[str, Any]]:
    """Writes ``bundles`` as the piece ``group``, or as ``group-1`` to ``group-n`` where they are larger than one."""
    pieces = cut({b.name: b.size for b in bundles}, limit)
    by_name = {b.name: b for b in bundles}
    records = []
    for number, parts in enumerate(pieces, 1):
        name = group if len(pieces) == 1 else f"{group}-{number}"
        folder = out / name
        folder.mkdir(parents=True)
        files: list[dict[str, Any]] = []
        for part in parts:
            source = by_name[part.bundle]
            count = [p.bundle for piece in pieces for p in piece].count(part.bundle)
            file = folder / (f"{part.bundle}.tar.xz" + (f".{part.part}" if count > 1 else ""))
            with source.path.open("rb") as stream:
                stream.seek(part.start)
                data = stream.read(part.end - part.start)
            file.write_bytes(data)
            files.append({
                "file": file.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(),
                "bundle": part.bundle, "build": source.path.name.removesuffix(".tar.xz"),
                "part": part.part, "parts": count, "holds": source.holds,
            })  # fmt: skip
        record = {"piece": name, "size": sum(part.end - part.start for part in parts), "files": files}
        (folder / "piece.json").write_text(json.dumps(record, indent=1))
        records.append(record)
    return records


def main(
    out: Annotated[Path, typer.Option(help="where the pieces go, in place of what is there")] = Path(
        "artifacts/gpu-pack"
    ),
    cache: Annotated[Path, typer.Option(help="wheels, prepared runs and compressed bundles")] = Path(
        "artifacts/gpu-cache"
    ),
    data: Annotated[
        str, typer.Option(help="data sets, with commas; found under $VIVACE_DATA")
    ] = "ml-1m-benchmark,beauty",
    bundles: Annotated[str, typer.Option("--with", help="sections of pieces.toml, with commas")] = "onnxruntime-gpu",
    python: Annotated[str, typer.Option(help="of the machine with the GPU")] = "3.12",
    level: Annotated[int, typer.Option(help="of xz", min=0, max=9)] = 6,
    limit_mib: Annotated[float, typer.Option(help="of one piece", min=0.1)] = 60,
) -> None:
    """Pack code, prepared runs and wheels for a machine with a GPU and no network."""
    sections = tomllib.loads(PIECES.read_text())
    extra = [name for name in bundles.split(",") if name]
    if unknown := [name for name in extra if name not in sections]:
        raise typer.BadParameter(f"{unknown}: pieces.toml has {sorted(sections)}", param_hint="--with")
    cache.mkdir(parents=True, exist_ok=True)
    commit = commit_of_checkout()

    def wheels_of(name: str) -> Bundle:
        section = sections[name]
        return bundle(name, ", ".join(section["wheels"]), packages(section, python, cache / "wheels"), cache, level)

    runs = [c for name in data.split(",") if name for c in prepared(name, cache / "runs")]
    base = [
        bundle("code", f"the checkout at {commit}", code(commit), cache, level),
        bundle("runs", f"prepared runs: {data}", runs, cache, level),
        wheels_of("served"),
    ]
    groups = {"base": base} | {name: [wheels_of(name)] for name in extra}
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    records = [r for group, parts in groups.items() for r in write_pieces(group, parts, int(limit_mib * MIB), new)]
    (new / "pieces.json").write_text(json.dumps({"python": python, "commit": commit, "pieces": records}, indent=1))
    shutil.copy(UNPACK, new / UNPACK.name)
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    for record in records:
        holds = "; ".join(f"{f['file']} {f['size'] / MIB:.1f} MiB: {f['holds']}" for f in record["files"])
        print(f"{out / record['piece']}: {record['size'] / MIB:.1f} MiB: {holds}")


if __name__ == "__main__":
    typer.run(main)
