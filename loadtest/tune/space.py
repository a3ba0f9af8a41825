"""What ``vivace tune`` searches: objectives, the knobs of a configuration, and the profiles that it becomes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from serving import repository
from serving.default_profile import default_profile
from serving.profiles import ENSEMBLE, ONE_PROCESS
from vivace import contract, machine
from vivace.run import COMPILED, COMPRESSED, Run

TOP_K = 10
LIMITS = (1, 2, 4, 0)  # how wide the limits under overload are, in the order that they are tried


@dataclass(frozen=True)
class Objective:
    """``percentile`` of the latencies within ``ms``; NDCG@10 at least ``quality`` of the uncompressed run's."""

    percentile: float
    ms: float
    quality: float

    @classmethod
    def parse(cls, slo: str, quality: float) -> Objective:
        """Of "p99=20ms". Raises ValueError."""
        match = re.fullmatch(r"p(\d+(?:\.\d+)?)=(\d+(?:\.\d+)?)ms", slo.strip())
        if not match or not 0 < float(match[1]) < 100 or not float(match[2]) > 0:
            raise ValueError(f"--slo: expected such as p99=20ms, got {slo!r}")
        if not 0 < quality <= 1:
            raise ValueError(f"--quality: expected a share of the best in (0, 1], got {quality}")
        return cls(float(match[1]), float(match[2]), quality)

    @property
    def attained(self) -> float:
        """Least share of the requests that must be answered in time."""
        return self.percentile / 100

    def __str__(self) -> str:
        return f"p{self.percentile:g} within {self.ms:g} ms, NDCG@10 at least {self.quality:.1%}"


@dataclass(frozen=True)
class Answer:
    """What changes the answer. ``engine``: folder under the run ("" is the run itself)."""

    engine: str
    history: int
    ranked: int


@dataclass(frozen=True)
class Trial:
    """One configuration. ``layout``: "fused" or "ensemble"; ``instances`` of the fused model, or of retrieval;
    ``batch`` the largest; ``preferred``: the batch, and its doubles, that is sent at once while a smaller one waits
    ``delay_us`` (0: only the largest)."""

    engine: str
    history: int
    ranked: int
    layout: str
    instances: int
    threads: int
    batch: int
    preferred: int
    delay_us: int

    @property
    def answer(self) -> Answer:
        return Answer(self.engine, self.history, self.ranked)

    def profile(self, **limits: Any) -> repository.ServingProfile:
        """``limits``: what happens under overload. While trials are run there are none: whole answers or late ones."""
        return repository.ServingProfile(
            max_batch_size=self.batch,
            preferred_batch=self.preferred,
            queue_delay_us=self.delay_us,
            retrieval_instances=self.instances,
            ranking_instances=max(1, self.instances - 1),
            threads=self.threads,
            fused=self.layout == ONE_PROCESS,
            recommend_instances=self.instances,
            history=self.history,
            ranked=self.ranked,
            **limits,
        )

    def __str__(self) -> str:
        return (
            f"{self.engine or 'whole model'}, history {self.history}, {self.ranked} ranked, {self.layout}, "
            f"{self.instances} instances x {self.threads} threads, batch {self.batch}, "
            f"preferred {self.preferred}, delay {self.delay_us} us"
        )


KNOBS = tuple(f.name for f in fields(Trial))


def engines(root: Path) -> dict[str, Path]:
    """Compiled runs that may serve in this one's place, by folder: itself and its compressed variants."""
    run = Run(root)
    run.manifest(COMPILED)
    variants = (Run(folder) for folder in sorted(run.variants.glob("*")) if Run(folder).card_file.exists())
    return {"": root} | {f"{COMPRESSED}/{variant.root.name}": variant.root for variant in variants}


def default_space(root: Path) -> dict[str, list[Any]]:
    """What is searched. Values of histories and candidates that an engine does not have are left out."""
    s, cores = Run(root).shapes(), machine.cores()
    return {
        "engine": list(engines(root)),
        "history": [s.history, s.history // 2, s.history // 4],
        "ranked": [s.candidates, s.candidates // 2, s.candidates // 4],
        "layout": [ONE_PROCESS, ENSEMBLE],
        "instances": sorted({1, max(1, cores // 2), cores, cores + 1}),
        "threads": [1, 2],
        "batch": [16, 64],
        "preferred": [0, 4, 8],
        "delay_us": [0, 500, 2000],
    }


def untuned(root: Path) -> Trial:
    """What ``vivace serve`` runs without a profile."""
    s, p = Run(root).shapes(), repository.PROFILES[default_profile(Run(root).repository)[0]]
    layout, instances = (ONE_PROCESS, p.recommend_instances) if p.fused else (ENSEMBLE, p.retrieval_instances)
    batches = (p.max_batch_size, p.preferred_batch, p.queue_delay_us)
    return Trial("", s.history, s.candidates, layout, instances, p.threads, *batches)


def trials(space: Mapping[str, Sequence[Any]], root: Path) -> list[Trial]:
    """Every configuration of a space. Raises ValueError for an unknown knob or value."""
    unknown = set(space) - set(KNOBS)
    if unknown:
        raise ValueError(f"--space: expected knobs of {KNOBS}, got {sorted(unknown)}")
    start, possible = asdict(untuned(root)), []
    known = engines(root)
    for values in itertools.product(*(space.get(k, [start[k]]) for k in KNOBS)):
        trial = Trial(*values)
        if trial.engine not in known:
            raise ValueError(f"--space: engine: expected one of {sorted(known)}, got {trial.engine!r}")
        if trial.layout not in (ONE_PROCESS, ENSEMBLE):
            raise ValueError(f"--space: layout: expected fused or ensemble, got {trial.layout!r}")
        s = Run(known[trial.engine]).shapes()
        if trial.history > s.history or trial.ranked > s.candidates or trial.ranked < TOP_K or trial.history < 1:
            continue
        if trial.layout == ENSEMBLE and trial.ranked != s.candidates:
            continue  # the ensemble ranks all
        if trial.preferred and (not trial.delay_us or trial.preferred >= trial.batch):
            continue  # nothing waits for it
        possible.append(trial)
    if not possible:
        raise ValueError("--space: expected at least one configuration that the engines can run, got none")
    return possible


def write_profile(folder: Path, name: str, profile: repository.ServingProfile) -> None:
    """``configs/<name>.pbtxt`` of every model of a compiled run. Raises ValueError for the name of a profile that was
    published with it."""
    if name in (ENSEMBLE, *repository.PROFILES):
        raise ValueError(f"--save-as {name}: a profile of every run is called so; choose another name")
    run = Run(folder)
    schema, target = run.schema(), run.repository
    served = repository.read_config(target, contract.ENSEMBLE, "").parameters
    metadata = {
        key: served[key].string_value for key in ("precision", "tables", "gate", contract.DATA) if key in served
    }
    repository.write_profile(target, run.shapes(), schema.heads, name, profile, schema.exclude_seen, metadata)


def drop_profile(folder: Path, name: str) -> None:
    for path in Run(folder).repository.glob(f"*/configs/{name}.pbtxt"):
        path.unlink()


def overload_limits(trial: Trial, ms: float, qps: float, times: np.ndarray, factor: int) -> dict[str, int]:
    """What a profile does under overload. ``times``: ms of a batch by its size. Batches that take half of the
    objective, or the largest, are a sign of overload; a queue may hold what can be answered within the objective; what
    has waited that long is refused. ``factor`` makes both wider (0: no sign is one)."""
    timeout = int(ms * 1000)
    rows = min(max(2, int(np.searchsorted(times, ms / 2))), trial.batch) if trial.batch > 1 else 0
    queue = max(16, int(qps * max(ms - times[rows or -1] / 2, ms / 4) / 1000))
    if not factor or not rows:
        return {"max_queue": max(queue, trial.batch) * LIMITS[-2], "queue_timeout_us": timeout, "overload_rows": 0}
    return {
        "max_queue": queue * factor, "queue_timeout_us": timeout, "overload_rows": min(rows * factor, trial.batch),
    }  # fmt: skip
