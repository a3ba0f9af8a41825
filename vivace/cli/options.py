"""What the verbs of the command line share: options, one way to say something, sizes by preset."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vivace.cli.values import choice, json_file, one_of, plain_name, run_name, values_of
from vivace.credentials import CA_VARIABLE, KEY_VARIABLE, SYSTEM

# markup and emoji codes are off: titles, ids and messages are printed as they are, in tables as well
console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False, highlight=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)

DATA_SETS = values_of("preprocessing.readers:DATA_SETS")
PRESETS = values_of("training.presets:PRESETS")
PRECISIONS = values_of("training.compile.quantize:PRECISIONS")
PROTOCOLS = values_of("vivace.client:PROTOCOLS")
TASKS = ("recommend", "search")
ENCODER_HELP = "with --task search: ours, minilm, or a folder or Hugging Face name of a sentence encoder"

Data = Annotated[str, choice("--data", DATA_SETS, "data set")]
DataPath = Annotated[
    Path | None,
    typer.Option(
        "--path",
        help="folder of the data set (default $VIVACE_DATA/<its folder>); of tables, the TOML file of their mapping",
        exists=True,
        readable=True,
    ),
]
Name = Annotated[
    str,
    typer.Option("--name", help="run under --artifacts; default: see 'vivace --help'", parser=run_name, metavar="RUN"),
]
NewName = Annotated[
    str,
    typer.Option("--name", help="run to make; the data set's name if empty", parser=plain_name, metavar="RUN"),
]
Artifacts = Annotated[Path, typer.Option("--artifacts", help="where runs are kept", file_okay=False)]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        help=f"sizes: {', '.join(PRESETS)} ('vivace presets' describes them) or a JSON file; as trained, or by the "
        "data set, if empty",
        parser=one_of(PRESETS, also_json=True),
        metavar="NAME",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Profile = Annotated[
    str,
    typer.Option(
        "--profile", help="configs/<profile>.pbtxt; by the machine if empty", parser=plain_name, metavar="NAME"
    ),
]
Precision = Annotated[str, choice("--precision", PRECISIONS, "of the graphs (docs/compress.md)")]
Tables = Annotated[
    str,
    choice("--tables", values_of("training.compile.compiler:TABLES"), "of items; int8 takes a quarter of the memory"),
]
Bound = Annotated[
    float, typer.Option("--bound", help="relative fall of NDCG@10 that the quality gate lets through", min=0, max=1)
]
Force = Annotated[bool, typer.Option("--force", help="publish what the quality gate refuses; it is recorded")]
Wandb = Annotated[
    bool, typer.Option("--wandb", help="log to Weights & Biases too (offline without a key; WANDB_MODE decides)")
]
Host = Annotated[str, typer.Option("--host", help="address to bind or to call")]
Protocol = Annotated[str, choice("--protocol", PROTOCOLS, "of the call")]
Key = Annotated[
    str, typer.Option("--key", envvar=KEY_VARIABLE, show_default=False, help="for a server that asks for one")
]
TlsCa = Annotated[
    str,
    typer.Option(
        "--tls-ca",
        envvar=CA_VARIABLE,
        show_default=False,
        metavar="FILE",
        help=f"for a server with TLS: PEM of its certificate or authority, or {SYSTEM!r} for those of this machine",
    ),
]
TlsCert = Annotated[
    str,
    typer.Option(
        "--tls-cert",
        envvar="VIVACE_TLS_CERT",
        show_default=False,
        metavar="FILE",
        help="for a server that asks for a certificate: yours and its key, in one PEM",
    ),
]
DEFAULT_ARTIFACTS = Path("artifacts")
MAX_PORT = 65535


def credentials(key: str, tls_ca: str, tls_cert: str) -> dict[str, Any]:
    """What the options of a caller mean to a client."""
    return {"key": key, "ca": tls_ca, "cert": (tls_cert, tls_cert) if tls_cert else None}


def say(text: str) -> None:
    """One line of progress or result, printed as it is."""
    console.print(Text("·", style="dim"), text, soft_wrap=True)


def progress(status: Any) -> Callable[[str], None]:
    """Shows texts as they are in the line of ``console.status``."""
    return lambda text: status.update(Text(text))


def chosen_preset(name: str, root: Path, recorded: bool = True) -> Any:
    """The preset ``name``; without one what the run was trained with (``recorded``), or the one that suits its data,
    which it says.

    Raises BadParameter for a preset that cannot be read, ValueError where another version recorded the run's."""
    from preprocessing.features import Features
    from training.advice import sizes_of, suited
    from training.presets import from_json, preset
    from vivace.run import FEATURES, Run

    run = Run(root)
    if recorded and not name and run.preset.exists():
        try:
            return from_json(json.loads(run.preset.read_text()))
        except TypeError as error:
            raise ValueError(
                f"{run.preset}: sizes of another version of vivace ({error}); run 'vivace train' again"
            ) from None
    if name.endswith(".json"):
        json_file(Path(name), "--preset")
    if not name and run.has(FEATURES):
        name, why = suited(sizes_of(Features(run.features)))
        say(f"preset {name}: {why}; --preset takes another")
    return preset(name or "cpu")


def track(wandb: bool) -> None:
    if wandb:
        from training.tracking import use_wandb

        use_wandb()


def with_overrides(chosen: Any, epochs: int = 0, loss: str = "") -> Any:
    if epochs:
        chosen = replace(chosen, retrieval=replace(chosen.retrieval, epochs=epochs))
    if loss:
        chosen = replace(chosen, retrieval=replace(chosen.retrieval, loss=loss))
    return chosen
