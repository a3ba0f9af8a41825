#!/usr/bin/env python3
"""Unpacks pieces of ``make gpu-pack`` on a machine that has nothing of the project yet. Standard library only.

    python3 unpack.py FOLDER [PIECE...] [--to ~/.cache/vivace/gpu]
    . ~/.cache/vivace/gpu/env.sh

Pieces may come in several rounds: a bundle is unpacked when its last part is there, into a folder of its name. env.sh
puts what is there so far on the paths; ``VIVACE_CODE`` names a checkout to use in place of the code that came along.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shlex
import shutil
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

UNPACKED = ".build"  # in the folder of a bundle: which build of it this is


class Chain(io.RawIOBase):
    """Files read one after another, as one."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths: list[Path] = list(paths)
        self.stream: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.stream is None:
                if not self.paths:
                    return 0
                self.stream = self.paths.pop(0).open("rb")
            data = self.stream.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            self.stream.close()
            self.stream = None


def problems(folder: Path) -> list[str]:
    """One line for each file of a piece that is missing or not what it was when it was packed."""
    record = folder / "piece.json"
    try:
        piece = json.loads(record.read_text())
    except (OSError, ValueError) as error:
        return [f"piece {folder.name}: {record}: {error}; carry it again"]
    wrong = []
    for file in piece["files"]:
        path = folder / file["file"]
        if not path.exists():
            wrong.append(f"piece {folder.name}: {path.name} is missing; carry it again")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
            wrong.append(
                f"piece {folder.name}: {path.name} is damaged ({path.stat().st_size:,} bytes of {file['size']:,}); "
                "carry it again"
            )
    return wrong


def keep_parts(folder: Path, to: Path) -> dict[str, tuple[str, int]]:
    """Copies the parts of a piece beneath ``to``; (build, number of parts) of each bundle in it."""
    bundles = {}
    for file in json.loads((folder / "piece.json").read_text())["files"]:
        parts = to / ".parts" / file["build"]
        parts.mkdir(parents=True, exist_ok=True)
        part = parts / f"{file['part']:03d}"
        if not part.exists():
            shutil.copy(folder / file["file"], part.with_suffix(".partial"))
            part.with_suffix(".partial").rename(part)
        bundles[file["bundle"]] = (file["build"], file["parts"])
    return bundles


def unpack(bundle: str, build: str, parts: int, to: Path) -> str:
    """Unpacks a bundle whose parts are all there; one line of what was done."""
    target, started = to / bundle, time.monotonic()
    if (target / UNPACKED).exists() and (target / UNPACKED).read_text() == build:
        return f"{bundle}: there already"
    there = sorted((to / ".parts" / build).glob("[0-9]*[0-9]"))
    if len(there) < parts:
        return f"{bundle}: {len(there)} of {parts} parts; waiting for the others"
    new = to / f".{bundle}.new"
    shutil.rmtree(new, ignore_errors=True)
    with tarfile.open(fileobj=io.BufferedReader(Chain(there), 2**20), mode="r|xz") as tar:
        tar.extractall(new, filter="data")
    (new / UNPACKED).write_text(build)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    shutil.rmtree(to / ".parts" / build)
    return f"{bundle}: unpacked in {time.monotonic() - started:.1f} s"


def libraries() -> list[Path]:
    """Folders of the CUDA libraries that came with torch's packages, for what loads them by name."""
    return sorted({p.resolve() for entry in sys.path for p in Path(entry or ".").glob("nvidia/*/lib") if p.is_dir()})


def write_env(to: Path) -> None:
    sites = [str(site) for site in sorted(to.glob("*/site"))]
    paths = {"PYTHONPATH": sites, "LD_LIBRARY_PATH": [str(p) for p in libraries()]}
    lines = [f"export VIVACE_GPU={shlex.quote(str(to))}", f"export VIVACE_ARTIFACTS={shlex.quote(str(to / 'runs'))}"]
    for name, entries in paths.items():
        code = '"${VIVACE_CODE:-$VIVACE_GPU/code}"' if name == "PYTHONPATH" else ""
        joined = ":".join([code, *map(shlex.quote, entries)] if code else map(shlex.quote, entries))
        if joined:
            lines.append(f'export {name}={joined}"${{{name}:+:${name}}}"')
    (to / "env.sh").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack pieces of make gpu-pack")
    parser.add_argument("folder", type=Path, help="folder of the pieces")
    parser.add_argument("pieces", nargs="*", help="names of pieces (default: those that are there)")
    parser.add_argument("--to", type=Path, default=Path.home() / ".cache" / "vivace" / "gpu")
    options = parser.parse_args()
    to = options.to.absolute()
    names = options.pieces or sorted(p.parent.name for p in options.folder.glob("*/piece.json"))
    if not names:
        sys.exit(f"gpu-unpack: no piece in {options.folder}; make gpu-pack writes them")
    folders = [options.folder / name for name in names]
    to.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as threads:
        wrong = [line for lines in threads.map(problems, folders) for line in lines]
        if wrong:
            sys.exit("\n".join(f"gpu-unpack: {line}" for line in wrong))
        bundles = {
            b: build for found in threads.map(lambda f: keep_parts(f, to), folders) for b, build in found.items()
        }
        for line in threads.map(lambda b: unpack(b, *bundles[b], to), bundles):
            print(f"gpu-unpack: {line}", flush=True)
    write_env(to)
    print(f"gpu-unpack: . {to}/env.sh")


if __name__ == "__main__":
    main()
