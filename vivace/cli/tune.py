"""``vivace tune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, reported, say


def tune(
    name: Name = "shop",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    slo: Annotated[str, typer.Option(help="percentile of the latencies and its bound")] = "p99=20ms",
    quality: Annotated[float, typer.Option(help="NDCG@10 as a share of the uncompressed run's")] = 0.99,
    budget: Annotated[float, typer.Option(help="minutes; a search that was cut short goes on where it was")] = 10.0,
    save_as: Annotated[str, typer.Option(help="name of the profile: configs/<name>.pbtxt")] = "tuned",
    space: Annotated[Path | None, typer.Option(help='JSON of values by knob, such as {"batch": [8, 16]}')] = None,
    seconds: Annotated[float, typer.Option(help="of one run under load")] = 4.0,
    restart: Annotated[bool, typer.Option(help="forget what an earlier search measured")] = False,
) -> None:
    """Find the configuration that answers the most requests within an objective; then: vivace serve --profile."""
    from loadtest.tune.space import Objective
    from loadtest.tune.tune import FOLDER
    from loadtest.tune.tune import tune as run
    from vivace.manifest import exclusive

    with reported():
        root, objective = artifacts / name, Objective.parse(slo, quality)
        wanted = json.loads(space.read_text()) if space else None
        with exclusive(root), console.status(str(objective)) as status:
            show = lambda text: status.update(text)  # noqa: E731
            found = run(root, objective, save_as, budget * 60, say, show, wanted, seconds, restart)
        chosen = found["chosen"]
        gain = f", {chosen['qps'] / found['untuned']:.2f} times the untuned" if found["untuned"] else ""
        say(f"{objective}: {chosen['qps']:.0f} requests a second{gain}: {chosen['trial']}")
        say(f"vivace serve --name {name} --profile {save_as}; report {root / FOLDER / save_as}.html")
