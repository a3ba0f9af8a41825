"""pyproject.toml declares what the code imports, and requirements.txt locks all of it."""

from __future__ import annotations

import ast
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[3]
OURS = {"vivace", "preprocessing", "search", "serving", "training", "loadtest", "benchmarks"}
BEFORE_THE_LOCK = {"torch", "vivace"}  # torch comes first, by deploy/setup.sh
NOT_LOCKED = {
    "triton_python_backend_utils",  # Triton's own
    "cudf",  # where there is a GPU
    "tensorrt",
    "pynvml",  # where there is a GPU: benchmarks.gpu.served
    "torchrec",  # requirements-sharded.txt: vivace train --table-processes, which names it where it is missing
    "tantivy",  # only benchmarks.lexical_engines, which names it where it is missing
}


@cache
def declared() -> dict[str, set[str]]:
    """Names by extra, "" the core; an extra that names others holds theirs too."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}

    def names(extra: str) -> set[str]:
        requirements = [Requirement(r) for r in extras[extra]]
        nested = [names(e) for r in requirements if r.name == "vivace" for e in r.extras]
        return {canonicalize_name(r.name) for r in requirements}.union(*nested)

    return {extra: names(extra) for extra in extras}


def imports(*folders: str, without: str = "") -> dict[str, str]:
    """Third-party modules by top-level name, with a file that imports each."""
    found = {}
    for file in (f for folder in folders for f in sorted((CHECKOUT / folder).rglob("*.py"))):
        if without in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for top in {m.partition(".")[0] for m in modules}:
                if top not in OURS | NOT_LOCKED and top not in sys.stdlib_module_names:
                    found[top] = str(file.relative_to(CHECKOUT))
    return found


@pytest.mark.parametrize(
    ("folders", "without", "extras"),
    [
        (("vivace",), "", ("", "ui", "valkey")),
        (("search",), "ranker.py", ("", "search")),  # the ranker's training
        (("vivace", "preprocessing", "search", "serving", "training"), "", ("", "train", "ui", "valkey")),
        (("loadtest",), "", ("", "train", "load")),
        (("benchmarks",), "peers", ("", "dev")),  # peers have environments of their own
    ],
)
def test_what_is_imported_is_declared(folders, without, extras):
    distributions = packages_distributions()
    allowed = set().union(*(declared()[e] for e in extras))
    missing = {
        top: file
        for top, file in imports(*folders, without=without).items()
        if not allowed & {canonicalize_name(d) for d in distributions.get(top, [top])}
    }
    assert not missing


def test_what_is_declared_is_locked_at_a_version_that_fits():
    lines = (CHECKOUT / "requirements.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    locked = {canonicalize_name(n): v for n, v in locked.items()}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *(r for e in project["optional-dependencies"].values() for r in e)]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name not in BEFORE_THE_LOCK:
            assert name in locked, f"requirements.txt: {text} is not locked"
            assert requirement.specifier.contains(locked[name], prereleases=True), f"{text}: locked {locked[name]}"
