"""Nothing in the tree loads a pickle that it has not checked: loading one runs what is in it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "Workflow.load": "of NVTabular holds a pickle",
    "load_from_checkpoint": "reads a pickle",
    "read_pickle": "reads a pickle",
    "unsafe_load": "of YAML makes any object",
    "full_load": "of YAML makes objects",
}
ALLOWED = {
    # checks the files against the checksums of the step's manifest first
    ("preprocessing/workflow.py", "Workflow.load"),
    # a peer's model: it loads what the same command has saved into a temporary folder of its own
    ("benchmarks/peers/merlin_best.py", "Workflow.load"),
}


def name_of(node: ast.expr) -> str:
    """Dotted name of what is called, as far as it is one."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, *([node.id] if isinstance(node, ast.Name) else [])]))


def unsafe(source: str) -> Iterator[str]:
    """What loads or may load a pickle in a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            name, options = name_of(node.func), {k.arg: k.value for k in node.keywords}
            is_true = lambda key: getattr(options.get(key), "value", None) is True  # noqa: B023, E731
            if name == "torch.load" and not is_true("weights_only"):
                yield "torch.load without weights_only=True"
            if "allow_pickle" in options and getattr(options["allow_pickle"], "value", None) is not False:
                yield f"{name} with allow_pickle"
            if name == "yaml.load" and "Loader" not in options:
                yield name
            yield from (call for call in CALLS if (name == call or name.endswith(f".{call}")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import torch\ntorch.load(f)", "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=safe)", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=p)",
        "nvt.Workflow.load(f)", "pd.read_pickle(f)", "yaml.load(f)", "import cloudpickle as c", "import dill.x",
    ],
)  # fmt: skip
def test_unsafe_loads_are_seen(source):
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source", ["torch.load(f, weights_only=True)", "np.load(f)", "json.load(f)", "np.load(f, allow_pickle=False)"]
)
def test_safe_loads_pass(source):
    assert not list(unsafe(source))


def test_no_module_loads_a_pickle_unchecked():
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout.split()
    there = {(f, what) for f in files if (CHECKOUT / f).exists() for what in unsafe((CHECKOUT / f).read_text())}
    assert there - ALLOWED == set()
    assert ALLOWED - there == set()  # what is no longer there leaves the list
