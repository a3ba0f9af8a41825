"""How large files, functions and rooms may grow. What is larger today is listed below, and the lists only shrink."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
FILE_LINES, FUNCTION_LINES, ROOM_FILES = 400, 80, 12
ROOMS = ("training", "loadtest")  # each folder in them holds at most ROOM_FILES files

LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
LARGE_ROOMS: set[str] = set()


def sources() -> list[Path]:
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    return [Path(f) for f in files.splitlines() if (CHECKOUT / f).exists()]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(file::function, lines with its decorators) of each function in a file."""
    for node in ast.walk(ast.parse((CHECKOUT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield f"{path}::{node.name}", node.end_lineno - first + 1


def check(too_large: dict[str, int], allowed: set[str], most: int, unit: str) -> None:
    """Nothing beyond ``most`` but what is listed; prints what is listed still, and what can leave the list."""
    if allowed & set(too_large):
        print(f"still over {most} {unit}: {sorted(allowed & set(too_large))}")
    if allowed - set(too_large):
        print(f"no longer over {most} {unit}, take off the list: {sorted(allowed - set(too_large))}")
    grown = {name: size for name, size in too_large.items() if name not in allowed}
    assert not grown, f"over {most} {unit}: {grown}"


def test_no_file_is_over_400_lines():
    lines = {str(f): len((CHECKOUT / f).read_text().splitlines()) for f in sources()}
    check({f: n for f, n in lines.items() if n > FILE_LINES}, LONG_FILES, FILE_LINES, "lines")


def test_no_function_is_over_80_lines():
    lines = dict(pair for f in sources() for pair in functions(f))
    check({f: n for f, n in lines.items() if n > FUNCTION_LINES}, LONG_FUNCTIONS, FUNCTION_LINES, "lines")


def test_no_room_has_over_12_files():
    counts = Counter(str(f.parent) for f in sources() if f.parts[0] in ROOMS and f.name != "__init__.py")
    check({room: n for room, n in counts.items() if n > ROOM_FILES}, LARGE_ROOMS, ROOM_FILES, "files")
