"""``vivace``: one verb a step. Each verb is a thin shell over a function of its stage's folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vivace.cli.compile import compile_
from vivace.cli.compress import compress
from vivace.cli.demo import demo
from vivace.cli.doctor import doctor
from vivace.cli.door import door
from vivace.cli.drift import drift
from vivace.cli.errors import reported
from vivace.cli.evaluate import evaluate
from vivace.cli.events import events
from vivace.cli.experiment import experiment
from vivace.cli.init_mapping import init_mapping
from vivace.cli.items import forget, items
from vivace.cli.keys import keys
from vivace.cli.load import load
from vivace.cli.optimize import optimize
from vivace.cli.options import console
from vivace.cli.parity import parity
from vivace.cli.prepare import prepare
from vivace.cli.presets import presets
from vivace.cli.pretrain import pretrain
from vivace.cli.publish import publish, rollback, scale, versions
from vivace.cli.query import query
from vivace.cli.refresh import refresh
from vivace.cli.report import report_compress
from vivace.cli.rollout import rollout
from vivace.cli.rules import rules
from vivace.cli.serve import serve
from vivace.cli.store import store
from vivace.cli.train import train
from vivace.cli.tune import tune
from vivace.cli.ui import ui
from vivace.cli.why import why

HELP = (
    "A real-time recommender: from a log of events to ranked answers of a Triton server.\n\n"
    "'vivace demo' goes the whole way on made-up data. Step by step: prepare, train, evaluate, compile, serve, query; "
    "each step ends with the command that follows.\n\n"
    "What a step makes lies in artifacts/RUN. Without --name, prepare calls the run after its data set (of tables: the "
    "name in the mapping); every other step takes the one run there is, or the one prepared last, and says which."
)

PANELS: dict[str, tuple[Callable[..., Any], ...]] = {
    "Start": (demo, doctor),
    "Data": (init_mapping, prepare),
    "Training": (presets, train, pretrain, optimize, evaluate, compress, compile_),
    "Serving": (serve, door, publish, rollback, versions, scale, refresh, forget, rules, tune, load),
    "Looking": (ui, query, why, drift, parity),
}


class Verbs(TyperGroup):
    """The group of all verbs: what goes wrong in any of them is reported here."""

    def invoke(self, ctx: Any) -> Any:
        with reported(bool(ctx.params.get("traceback"))):
            return super().invoke(ctx)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        from vivace.manifest import commit

        console.print(f"vivace {version('vivace')}, commit {commit()}")
        raise typer.Exit


app = typer.Typer(
    cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP,
    context_settings={"help_option_names": ["--help", "-h"]},
)  # fmt: skip
reports = typer.Typer(no_args_is_help=True)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print version and commit", is_eager=True, callback=_version)
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="show where an error came from; so does VIVACE_TRACEBACK=1")
    ] = False,
) -> None:
    """Options of every verb: see ``Verbs``."""


for panel, verbs in PANELS.items():
    for verb in verbs:
        text = " ".join((verb.__doc__ or "").split())  # Typer keeps the line breaks of a docstring
        app.command(verb.__name__.rstrip("_").replace("_", "-"), rich_help_panel=panel, help=text)(verb)
app.add_typer(items, name="items", help="Change the catalogue of the running server.", rich_help_panel="Serving")
app.add_typer(keys, name="keys", help="Keys of those who may call a server.", rich_help_panel="Serving")
app.add_typer(rollout, name="rollout", help="Try a version on a share of the users.", rich_help_panel="Serving")
app.add_typer(store, name="store", help="Move the store that a server keeps.", rich_help_panel="Serving")
app.add_typer(events, name="events", help="Read the log of live events, shared by workers.", rich_help_panel="Serving")
app.add_typer(
    experiment, name="experiment", help="What was shown, and which version is better by it.", rich_help_panel="Looking"
)
app.add_typer(reports, name="report", help="Pages that show what was measured.", rich_help_panel="Looking")
reports.command("compress")(report_compress)


def main() -> None:
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    warnings.filterwarnings("ignore", module="merlin|nvtabular|dask|cudf")
    app()


if __name__ == "__main__":
    main()
