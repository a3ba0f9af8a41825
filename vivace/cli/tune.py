"""``vivace tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, progress, say
from vivace.cli.runs import say_next, step
from vivace.cli.values import json_file, plain_name


def tune(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    slo: Annotated[str, typer.Option(help="percentile of the latencies and its bound")] = "p99=20ms",
    quality: Annotated[float, typer.Option(help="NDCG@10 as a share of the uncompressed run's", max=1.0)] = 0.99,
    budget: Annotated[
        float, typer.Option(help="minutes; a search that was cut short goes on where it was", min=0.01)
    ] = 10.0,
    save_as: Annotated[
        str, typer.Option(help="name of the profile: configs/NAME.pbtxt", parser=plain_name, metavar="NAME")
    ] = "tuned",
    space: Annotated[
        Path | None,
        typer.Option(help='JSON of values by knob, such as {"batch": [8, 16]}', exists=True, dir_okay=False),
    ] = None,
    seconds: Annotated[float, typer.Option(help="of one run under load", min=0.1)] = 4.0,
    restart: Annotated[bool, typer.Option(help="forget what an earlier search measured")] = False,
) -> None:
    """Find the configuration that answers the most requests within an objective; then: vivace serve --profile."""
    values = json_file(space, "--space") if space else None
    with step(name, artifacts) as run:
        from loadtest.tune.decision import quality_sentence
        from loadtest.tune.space import Objective
        from loadtest.tune.tune import tune as search_profiles

        objective = Objective.parse(slo, quality)
        with console.status(str(objective)) as status:
            show = progress(status)
            decision = search_profiles(run.root, objective, save_as, budget * 60, say, show, values, seconds, restart)
    chosen = decision["chosen"]
    gain = f", {chosen['qps'] / decision['untuned']:.2f} times the untuned" if decision["untuned"] else ""
    say(f"{objective}: {chosen['qps']:.0f} requests a second{gain}: {chosen['trial']}")
    say(quality_sentence(decision))
    say(f"report {run.tuning / save_as}.html")
    say_next(f"serve --profile {save_as}", run, artifacts)
