"""``vivace tune``: the configuration that answers the most requests within an objective and keeps the ranking quality.

Knobs that change the answer (engine, history read, candidates ranked) are judged offline: NDCG@10 of the very graphs on
recorded validation requests, paired with the whole model, kept on either half of the requests. Knobs that do not
(layout, instances, threads, batch, delay) and the speed of all are judged on the live server under open-loop load. A
queueing model of measured service times (``queueing``), corrected by every run, says what to try next; a trial that
does not beat the best so far ends after its first run. The two best are run in turns before one is chosen. The test
requests make the load; their targets are not read.

Everything measured is appended to ``artifacts/<name>/tuning/<profile>.jsonl``, quality to ``quality.jsonl`` there for
all profiles, and never measured twice: an interrupted tuning goes on where it was, and the decision can be made again
from the logs alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.tune.decision import decision, reachable, worth
from loadtest.tune.journal import BudgetError, live_runs
from loadtest.tune.report import write
from loadtest.tune.space import Objective, Trial, engines, trials, write_profile
from loadtest.tune.tuner import QUALITY, Tuner
from serving import repository
from serving.wheel import ServerError
from vivace.manifest import Progress, write_text
from vivace.run import Run


def publish(root: Path, name: str, record: dict[str, Any], limits: Mapping[str, int]) -> Path:
    """Writes the chosen profile where its engine is and the record that ``vivace serve --profile`` reads."""
    trial = Trial(**record["chosen"]["trial"])
    write_profile(engines(root)[trial.engine], name, trial.profile(**limits))
    record["limits"] = dict(limits)
    path = Run(root).tuning / f"{name}.json"
    write_text(path, json.dumps(record, indent=2))
    return path


def _out_of_reach(tuner: Tuner, budget_s: float) -> ValueError:
    """The error of an objective that nothing met: what is near it, or that the budget did not suffice to say."""
    try:
        nearest = "; ".join(reachable(tuner))
    except BudgetError:
        return ValueError(
            f"{tuner.objective}: nothing that meets it was found in {budget_s / 60:g} minutes; what was measured is "
            "kept: run the same command again, or give a larger --budget"
        )
    return ValueError(f"{tuner.objective}: not reachable here. Nearest: {nearest}")


def tune(
    root: Path, objective: Objective, name: str, budget_s: float, say: Progress, show: Callable[[str], None],
    space: Mapping[str, Sequence[Any]] | None = None, seconds: float = 4.0, restart: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Tunes, publishes the profile and writes the report; returns the decision. Raises ValueError where the objective
    cannot be met, naming what can."""
    if name in repository.PROFILES or f"{name}.jsonl" == QUALITY:
        raise ValueError(f"--save-as: expected a name of its own, got {name!r}, which every repository has")
    folder = Run(root).tuning
    if restart:
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    tuner = Tuner(root, objective, name, space, budget_s, seconds, say, show)
    try:
        everything = trials(tuner.space, root)
        best = tuner.choose(everything)
        if best is None:
            raise _out_of_reach(tuner, budget_s)
        record = decision(tuner, best, everything)
        times = tuner.service(best.trial.answer, best.trial.layout)
        limits = tuner.limits(best, times.table(best.trial.batch))
        record["worth"] = worth(tuner, best)
        record["service_ms"] = dict(times.batches)
        record["overhead_ms"] = times.request
        record["runs"] = live_runs(tuner.journal)
        publish(root, name, record, limits)
        write(record, folder / f"{name}.html", root.name)
        return record
    except ServerError as error:
        raise ValueError(f"tuning: a server did not start: {error}") from None
    finally:
        tuner.close()
