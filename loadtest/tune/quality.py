"""What the tuner judges answers by: NDCG@10 of the served graphs on the recorded validation requests. It never reads
those of the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from loadtest.tune.journal import Journal
from loadtest.tune.offline import gains, share_kept
from loadtest.tune.space import Answer, untuned
from serving.runtime.pipeline import Pipeline
from vivace.run import COMPILED, Run
from vivace.store.lmdb_store import LmdbStore

PART = "valid"  # of the split: what the configuration is chosen on


class Quality:
    """Judges answers of the ``engines`` of a run; each is measured once and kept in ``journal``."""

    def __init__(
        self, root: Path, engines: Mapping[str, Path], store: LmdbStore, journal: Journal, show: Callable[[str], None]
    ) -> None:
        self.root, self.engines, self.store, self.journal, self.show = root, engines, store, journal, show

    def pipeline(self, answer: Answer, threads: int = 1) -> Pipeline:
        """The graphs that give an answer, in this process."""
        folder = self.engines[answer.engine]
        return Pipeline.published(folder, self.store, threads, answer.history, answer.ranked)

    def version(self, answer: Answer) -> str:
        """Key of the compiled engine: what was measured of another one counts no more."""
        return str(Run(self.engines[answer.engine]).manifest(COMPILED)["key"])

    def gains(self, answer: Answer) -> np.ndarray:
        """NDCG@10 of each recorded request, float64."""
        self.show(f"quality of {answer.engine or 'whole model'}, history {answer.history}, {answer.ranked} ranked")
        key = ["quality", PART, asdict(answer), self.version(answer)]
        return np.array(self.journal(key, lambda: gains(self.pipeline(answer), self.root, PART)))

    def share(self, answer: Answer, half: int | None = None) -> tuple[float, tuple[float, float]]:
        """NDCG@10 as a share of the uncompressed run's on all requests or one half of them, with its 95 % interval."""
        rows = slice(half, None, 1 if half is None else 2)
        return share_kept(self.gains(untuned(self.root).answer)[rows], self.gains(answer)[rows])

    def kept(self, answer: Answer) -> float:
        """That share on the half of the requests where it is less: what chance gave an answer on one half, the other
        half denies it."""
        return min(self.share(answer, half)[0] for half in (0, 1))
