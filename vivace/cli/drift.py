"""``vivace drift``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, say
from vivace.cli.runs import find_run, run_name


def drift(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    hours_ago: Annotated[
        int, typer.Option(help="that whole hour instead of the last 60 minutes, up to a day back", min=0, max=23)
    ] = 0,
) -> None:
    """How far the running server's requests and answers are from those of training: of each feature what it was, what
    it is in the last hour, the PSI (below .1 stable, from .25 on a large shift) and a verdict."""
    from serving.control import running_servers

    run = find_run(artifacts, name)
    servers = running_servers(run)
    if not servers:
        run_ = run_name(run, artifacts)
        raise FileNotFoundError(f"no running server of {run_} is known here; 'vivace serve --name {run_}' starts one")
    for server in servers:
        for report in server.drift(hours_ago):
            if report["features"] is None:
                say(
                    f"process {server.pid}, version {report['version']}: was compiled before there was a reference; "
                    "'vivace compile' makes a version that has one"
                )
                continue
            _print(f"process {server.pid}, version {report['version']}", report, hours_ago)


def _print(title: str, report: dict[str, Any], hours_ago: int) -> None:
    now = f"{hours_ago} h ago" if hours_ago else "last hour"
    table = Table(title=title, title_justify="left")
    for column in ("feature", "training", now, "requests", "PSI", "KS", "verdict"):
        table.add_column(column, justify="right" if column in ("requests", "PSI", "KS") else "left", overflow="fold")
    for row in report["features"]:
        index, distance = ("" if row[key] is None else f"{row[key]:.3f}" for key in ("psi", "ks"))
        requests = f"{row['requests']:,}"
        table.add_row(row["feature"], row["reference"], row["now"], requests, index, distance, row["verdict"])
    console.print(table)
    say(f"training: {report['requests']:,} held-out requests ({report['part']}) by the compiled graphs")
    then = f"{report['reference_expected']:.3f} expected a request in the first ten, {report['reference_clicked']:.3f}"
    expected, clicked = report["expected"], report["clicked"]
    ratio = f", {clicked / expected:.2f} times as many" if expected else ""
    say(f"clicks, training: {then} came; {now}: {expected:,.1f} expected, {clicked:,.0f} events name a request{ratio}")
