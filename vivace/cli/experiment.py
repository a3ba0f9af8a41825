"""``vivace experiment``: impressions, report, uplift."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vivace.cli.options import DEFAULT_ARTIFACTS, Artifacts, Name, console, say
from vivace.cli.runs import find_run, joined_log
from vivace.cli.values import choice, values_of
from vivace.run import Run

JOINED = "file of 'vivace experiment impressions'; artifacts/RUN/impressions.parquet if empty"
Joined = Annotated[Path | None, typer.Option(help=JOINED)]
By = Annotated[str, choice("--by", values_of("training.judge.clicks.experiment:ARMS"), "what makes the arms")]
experiment = typer.Typer(no_args_is_help=True)

EventTypes = Annotated[
    list[str] | None,
    typer.Option("--event", metavar="TYPE", help="type that counts as a click; may be given again (default all)"),
]


@experiment.command(
    help="Join what was shown (vivace serve --impressions) with the events that name its requests: a Parquet with one "
    "row a shown item."
)
def impressions(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    event: EventTypes = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write; artifacts/RUN/impressions.parquet if empty", dir_okay=False)
    ] = None,
) -> None:
    from vivace.impressions.files import joined_of
    from vivace.impressions.joined import join
    from vivace.impressions.queue import folder_of
    from vivace.store.opening import store_of_worker

    run = find_run(artifacts, name)
    folder = folder_of(run.feature_store)
    file = out or joined_of(folder)
    with console.status("joining"), contextlib.closing(store_of_worker(run.feature_store, readonly=True)) as store:
        counts = join(folder, store, file, event or ())
    say(
        f"{counts.requests:,} requests ({counts.empty:,} shown nothing), {counts.shown:,} items shown, "
        f"{counts.clicked:,} of them with an event; {counts.strays:,} events are of no request in the log"
    )
    say(f"wrote {file}")


@experiment.command(
    help="Say which arm is better, by a joined log: CTR, NDCG of clicks, coverage and latency of each, and intervals "
    "that hold however often one looks; a page with pictures. With --target also what another version would have been "
    "clicked."
)
def report(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    joined: Joined = None,
    by: By = "variant",
    control: Annotated[str, typer.Option(help="the arm that others stand beside; the first by name if empty")] = "",
    top_k: Annotated[int, typer.Option(help="places of a request that count", min=1, max=100)] = 10,
    effect: Annotated[
        float, typer.Option(help="relative difference of CTR that is to be found; choose it before the first look")
    ] = 0.03,
    alpha: Annotated[float, typer.Option(help="error that is accepted, at all looks together")] = 0.05,
    power: Annotated[float, typer.Option(help="chance to find the effect where it is there")] = 0.8,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="of a rollout too: those that a step takes later count where they were")
    ] = False,
    target: Annotated[
        Path | None,
        typer.Option(
            help="Parquet of what another version shows for requests of the control: request_id, item_id, position, "
            "probability",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="page to write; artifacts/RUN/report/experiment.html if empty", dir_okay=False)
    ] = None,
) -> None:
    from loadtest.reports import experiment as pages
    from loadtest.reports.html import table
    from training.judge.clicks.drafts import teams
    from training.judge.clicks.experiment import evidence, shown_rows
    from vivace.sequential import Plan

    run = find_run(artifacts, name)
    file = joined_log(run, joined)
    plan, steps = Plan(effect, alpha, power), None if all_users else _steps(run, file, by)
    with console.status("counting"):
        seen = evidence(file, plan, by, control, top_k, steps)
        interleaved = teams(file, plan, seen.examined)
    say(f"{pages.when(seen.began_ms)} to {pages.when(seen.ended_ms)}; {pages.plan_words(seen.plan)}")
    _print(*pages.arm_rows(seen))
    if seen.crossed:
        say(f"{seen.crossed:,} users were in several arms and are left out")
    if len(seen.arms) > 1:
        _print(*pages.comparison_rows(seen))
    if places := pages.place_words(seen):
        say(places)
    more = []
    if interleaved:
        _print(*pages.team_rows(interleaved))
        say(pages.TEAM_WORDS)
        more = ["<h2>Interleaved</h2>", table(*pages.team_rows(interleaved)), f"<p>{pages.TEAM_WORDS}</p>"]
    if target is not None:
        import pyarrow.parquet as pq

        from training.judge.counterfactual import counterfactual

        with console.status("estimating"):
            estimate = counterfactual(shown_rows(file, by, seen.control), pq.read_table(target).to_pandas())
        _print(*pages.counterfactual_rows(estimate))
        say(pages.counterfactual_words(estimate))
        words = f"<p>{pages.counterfactual_words(estimate)}</p>"
        more += ["<h2>Another version</h2>", table(*pages.counterfactual_rows(estimate)), words]
    page = out or run.root / "report" / "experiment.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    pages.write(seen, page, more)
    say(f"wrote {page}")


@experiment.command(
    help="Say what showing an item is worth, by a joined log of a server with --explore: how many more clicks a "
    "request has than with the log's usual choice in its place, beside the item's CTR. Refutations say whether to "
    "believe it."
)
def uplift(
    name: Name = "",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    joined: Joined = None,
    by: By = "variant",
    arm: Annotated[str, typer.Option(help="whose rows count, by its name")] = "",
    least: Annotated[int, typer.Option(help="times that an item must have been shown", min=2)] = 30,
    most: Annotated[int, typer.Option(help="items of each end that are printed", min=1)] = 10,
    out: Annotated[Path | None, typer.Option(help="Parquet of all items, if any", dir_okay=False)] = None,
) -> None:
    from training.judge.clicks.experiment import shown_rows
    from training.judge.uplift import uplift as estimated

    run = find_run(artifacts, name)
    file = joined_log(run, joined)
    with console.status("estimating"):
        estimate = estimated(shown_rows(file, by, arm), least)
    items = estimate.items
    ends = items if len(items) <= 2 * most else items.iloc[[*range(most), *range(len(items) - most, len(items))]]
    rows = [
        (of.item_id, f"{of.uplift:+.4f}", f"{of.low:+.4f} to {of.high:+.4f}", f"{of.ctr:.4f}", f"{of.shown:,}")
        for of in ends.itertuples()
    ]
    _print(("item", "uplift, clicks a request", "95 % interval", "CTR", "shown"), rows)
    say(f"{estimate.requests:,} requests, {len(items):,} items that were shown {least} times and more")
    say(
        f"refutations: {estimate.placebo:.0%} of placebos have an effect (5 % is chance); a random cause moves an "
        f"uplift by {estimate.moved:.2f} standard errors"
    )
    if estimate.refuted:
        say(f"verdict: believe none of it: {'; '.join(estimate.refuted)}")
    else:
        say("verdict: neither refutation speaks against it")
    if out is not None:
        items.to_parquet(out)
        say(f"wrote {out}")


def _steps(run: Run, file: Path, by: str) -> Any:
    """Of the run's newest rollout, ``RolloutSteps``, where it made the arms of the log; else None."""
    from serving.rollout_steps import RolloutSteps
    from training.judge.clicks.experiment import arms_in
    from vivace.contract import TRIAL
    from vivace.impressions.files import VARIANT

    steps = RolloutSteps.read(run.root) if by == VARIANT else None
    if steps is None or TRIAL not in arms_in(file, by, steps.began_ms):
        return None
    say(f"rollout {steps.salt}: a user counts from the step that put that user on a side; --all-users counts all")
    return steps


def _print(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    shown = Table()
    for title in header:
        shown.add_column(title)
    for row in rows:
        shown.add_row(*map(str, row))
    console.print(shown)
