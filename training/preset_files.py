"""Preset files: JSON that names a preset, or another such file, and values by dotted name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from vivace.strict_json import strict_json


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    """(what a file builds on, its values by dotted name)."""
    try:
        values = strict_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--preset: {file}: expected a JSON file of a preset; {why}") from None
    if not isinstance(values, dict) or not isinstance(name := values.pop("preset", "cpu"), str):
        raise ValueError(f'--preset: {file}: expected a JSON object such as {{"preset": "cpu"}}')
    return name, values


def files_of(name: str, presets: Collection[str]) -> tuple[str, list[tuple[Path, dict[str, Any]]]]:
    """(the preset that ``name`` is or its file builds on, one of ``presets``; the files between with their values, the
    first to be applied first). A file that another names is seen from that one's folder. Raises ValueError for a file
    that is no such, or that builds on itself, and for a preset there is not."""
    changes, folder, where = dict[Path, dict[str, Any]](), Path(), ""
    while name.endswith(".json"):
        if (file := (folder / name).resolve()) in changes:
            raise ValueError(f'--preset: {name} builds on itself; name one of {sorted(presets)} under "preset"')
        name, changes[file] = _read(file)
        folder, where = file.parent, f'{file}: "preset": '
    if name not in presets:
        raise ValueError(f"--preset: {where}expected one of {sorted(presets)} or a JSON file, got {name!r}")
    return name, list(reversed(changes.items()))
