"""Values of options: those that the owning modules have, read without importing them, and refused with a list."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from vivace.cli import main, values

RUNNER = CliRunner()
FOLDER = Path(main.__file__).parent
OWNERS = sorted(
    {owner for file in FOLDER.glob("*.py") for owner in re.findall(r'values_of\("(.+?)"\)', file.read_text())}
)


@pytest.mark.parametrize("owner", OWNERS)
def test_values_read_are_the_module_s_own(owner):
    module, _, name = owner.partition(":")
    holder, _, field = name.rpartition(".")
    if holder:  # the annotation of a field: a Literal
        present = get_args(get_type_hints(getattr(import_module(module), holder))[field])
    else:
        present = tuple(getattr(import_module(module), name))
    assert values.values_of(owner) == present


def test_a_literal_is_read_from_its_field(tmp_path, monkeypatch):
    (tmp_path / "sizes.py").write_text(
        'Kind = Literal["a", "b"]\nMORE = (*get_args(Kind), "c")\nclass Config:\n    loss: Literal["x", "y"] = "x"\n'
    )
    monkeypatch.setattr(values, "CHECKOUT", tmp_path)
    assert values.values_of("sizes:MORE") == ("a", "b", "c")
    assert values.values_of("sizes:Config.loss") == ("x", "y")
    with pytest.raises(LookupError, match="sizes:NONE"):
        values.values_of("sizes:NONE")


REFUSED = (
    (["prepare", "--data", "ml1m"], ["shop", "ml-1m", "tables", "did you mean ml-1m?"]),
    (["prepare", "--split", "random"], ["leave-one-out", "time"]),
    (["prepare", "--name", "a/b"], ["slashes"]),
    (["prepare", "--name", "../up"], ["dot"]),
    (["prepare", "--partitions", "0"], ["--partitions", "1"]),
    (["prepare", "--data", "ml-1m", "--users", "5"], ["--users", "made-up shop"]),
    (["prepare", "--path", "/no/such/folder"], ["--path", "/no/such/folder"]),
    (["train", "--task", "serch"], ["recommend", "search", "did you mean search?"]),
    (["train", "--loss", "ful"], ["full", "sampled", "gbce"]),
    (["train", "--adapt", "loar"], ["full", "lora", "adapter"]),
    (["train", "--preset", "tinny"], ["tiny", "cpu", ".json"]),
    (["train", "--epochs", "-3"], ["--epochs", "0"]),
    (["train", "--from", "/no/such/folder"], ["--from"]),
    (["train", "--name", "artifacts/shop"], ["shop/compressed/small", "--artifacts"]),
    (["pretrain", "--objective", "masked,sesion"], ["masked", "session", "contrastive", "text"]),
    (["pretrain", "--objective", "text,masked"], ["text goes alone"]),
    (["optimize", "--trials", "0"], ["--trials"]),
    (["evaluate", "--task", "rank"], ["recommend", "search"]),
    (["evaluate", "--task", "search"], ["--path"]),
    (["evaluate", "--data", "msmarco"], ["esci"]),
    (["compile", "--precision", "fp31"], ["fp32", "fp16", "int8", "int8-qdq", "fp8"]),
    (["compile", "--tables", "int4"], ["fp32", "int8"]),
    (["compile", "--target", "cuda", "--target", "tpu"], ["openvino", "cuda", "tensorrt", "tensorrt-rtx", "aoti"]),
    (["compile", "--index", "IVF"], ["HNSW32", "HNSW32_SQ8"]),
    (["compile", "--bound", "nan"], ["--bound"]),
    (["compress", "--mixture", "moe"], ["mmoe", "ple", "shared"]),
    (["compress", "--variant", "a/b"], ["slashes"]),
    (["serve", "--http-port", "65536"], ["65535"]),
    (["serve", "--profile", "../x"], ["--profile"]),
    (["tune", "--save-as", "a/b"], ["slashes"]),
    (["load", "--protocol", "https"], ["grpc", "http", "both"]),
    (["load", "--shape", "sine"], ["constant", "ramp", "burst", "diurnal"]),
    (["load", "--seconds", "0"], ["--seconds", "1"]),
    (["load", "--users", "0"], ["--users"]),
    (["query", "--protocol", "https"], ["grpc", "http"]),
    (["query", "--top-k", "0"], ["--top-k"]),
    (["query", "--top-k", "101"], ["100"]),
    (["query", "--append", "item"], ["--append", "--user"]),
    (["query", "--event-type", "buy"], ["--event-type", "--append"]),
    (["query", "--text", "x", "--filters", "{a"], ["--filters", "not JSON"]),
    (["query", "--text", "x", "--filters", "[1]"], ["--filters", "object"]),
    (["query", "--url", "http://localhost:8000"], ["--url", "host:port"]),
    (["demo", "--data", "shopp"], ["shop"]),
    (["demo", "--load-seconds", "0"], ["--load-seconds"]),
    (["search"], ["No such command"]),
)


def words(text: str) -> str:
    """The message without the box around it."""
    return " ".join(line.strip("│╭╮╰╯─ ") for line in text.splitlines())


@pytest.mark.parametrize(("arguments", "named"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_wrong_value_is_refused_with_what_there_is(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = RUNNER.invoke(main.app, arguments)
    assert out.exit_code == 2, out.output
    message = words(out.stderr)
    assert all(text in message for text in named), message
    assert not list(tmp_path.iterdir())


def test_help_is_in_groups_and_loses_no_bracket():
    shown = RUNNER.invoke(main.app, ["--help"]).stdout
    positions = [shown.index(f"─ {panel} ─") for panel in main.PANELS]
    assert positions == sorted(positions)
    for name, verb in get_command(main.app).commands.items():
        assert name in shown
        for parameter in verb.params:
            text = parameter.help or ""
            assert Text.from_markup(text).plain == text


def test_help_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys; from typer.testing import CliRunner; from vivace.cli.main import app;"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0;"
        "print([m for m in ('torch', 'pandas', 'nvtabular', 'tritonclient', 'locust', 'onnx') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_version_names_the_commit():
    from vivace.manifest import commit

    assert commit() in RUNNER.invoke(main.app, ["--version"]).stdout
