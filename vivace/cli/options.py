"""What the verbs of the command line share: options, one way to say something, errors in one line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(width=None if sys.stdout.isatty() else 120)

Data = Annotated[
    str, typer.Option("--data", help="shop, ml-1m, ml-1m-benchmark, beauty, globo, hm, retailrocket or tables")
]
DataPath = Annotated[Path | None, typer.Option("--path", help="folder of the data set; for tables the TOML mapping")]
Name = Annotated[str, typer.Option("--name", help="folder under --artifacts; the data set's name if empty")]
Artifacts = Annotated[Path, typer.Option("--artifacts", help="where artifacts go")]
PresetName = Annotated[
    str, typer.Option("--preset", help="sizes by name or JSON file; by the data set, or as trained, if empty")
]
Seed = Annotated[int, typer.Option("--seed")]
Profile = Annotated[str, typer.Option("--profile", help='configs/<profile>.pbtxt; "" is config.pbtxt')]
Precision = Annotated[str, typer.Option("--precision", help="fp32, fp16, int8, int8-qdq or fp8: docs/compress.md")]
Tables = Annotated[str, typer.Option("--tables", help="of items: fp32, or int8 for a quarter of the memory")]
Bound = Annotated[float, typer.Option("--bound", help="relative fall of NDCG@10 that the quality gate lets through")]
Force = Annotated[bool, typer.Option("--force", help="publish what the quality gate refuses; it is recorded")]
Wandb = Annotated[
    bool, typer.Option("--wandb", help="log to Weights & Biases too (offline without a key; WANDB_MODE decides)")
]
Host = Annotated[str, typer.Option("--host", help="address to bind or to call")]
DEFAULT_ARTIFACTS = Path("artifacts")


def say(text: str) -> None:
    console.print(f"[dim]·[/dim] {text}", highlight=False)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Expected errors as one line and exit code 1; Ctrl-C as exit code 130. The rest shows its traceback."""
    from serving.launcher import ServerError
    from vivace.client import VivaceError
    from vivace.manifest import BusyError

    try:
        yield
    except (ValueError, FileNotFoundError, NotImplementedError, ServerError, BusyError, VivaceError) as error:
        console.print(f"[red]vivace:[/red] {error}", highlight=False, markup=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("stopped", highlight=False)
        raise typer.Exit(130) from None


def run_folder(artifacts: Path, name: str, data: str) -> Path:
    """``name`` under ``artifacts``, or the data set's."""
    return artifacts / (name or data)


def chosen_preset(name: str, root: Path, recorded: bool = True) -> Any:
    """The preset ``name``; without one what the run was trained with (``recorded``), or that of its data set."""
    from training.presets import PRESET, from_json, preset
    from vivace.contract import DataSchema

    own = root / PRESET
    if recorded and not name and own.exists():
        return from_json(json.loads(own.read_text()))
    schema = root / "features" / "schema.json"
    known = DataSchema.load(schema).name if schema.exists() else ""
    return preset(name or ("shop" if known == "shop" else "cpu"))


def track(wandb: bool) -> None:
    from training.tracking import WANDB

    if wandb:
        os.environ[WANDB] = "1"


def with_overrides(chosen: Any, epochs: int = 0, loss: str = "") -> Any:
    if epochs:
        chosen = replace(chosen, retrieval=replace(chosen.retrieval, epochs=epochs))
    if loss:
        chosen = replace(chosen, retrieval=replace(chosen.retrieval, loss=loss))
    return chosen
