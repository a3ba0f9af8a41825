"""``vivace``: one verb a step. Each verb is a thin shell over a function of its stage's folder."""

from __future__ import annotations

import os
from collections.abc import Callable

import typer

from vivace.cli.compile import compile_
from vivace.cli.compress import compress
from vivace.cli.demo import demo
from vivace.cli.doctor import doctor
from vivace.cli.evaluate import evaluate
from vivace.cli.load import load
from vivace.cli.optimize import optimize
from vivace.cli.prepare import prepare
from vivace.cli.pretrain import pretrain
from vivace.cli.query import query
from vivace.cli.report import report_compress
from vivace.cli.serve import serve
from vivace.cli.train import train
from vivace.cli.tune import tune

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
reports = typer.Typer(no_args_is_help=True)
app.add_typer(reports, name="report", help="Pages that show what was measured.")
VERBS: tuple[Callable[..., None], ...] = (
    prepare, train, pretrain, optimize, evaluate, compress, compile_, serve, tune, query, load, demo, doctor,
)  # fmt: skip
for verb in VERBS:
    app.command(verb.__name__.rstrip("_"))(verb)
reports.command("compress")(report_compress)


def main() -> None:
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    import warnings

    warnings.filterwarnings("ignore", module="merlin|nvtabular|dask|cudf")
    app()


if __name__ == "__main__":
    main()
