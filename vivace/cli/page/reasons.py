"""Why an item is in an answer: what the run's own graphs say, the way ``vivace why`` asks them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vivace.cli.page.catalogue import Catalogue
from vivace.run import Run

if TYPE_CHECKING:
    from serving.runtime.pipeline import Pipeline
    from vivace.client_request import PastEvent


class LocalReasons:
    """The graphs of the newest published version, loaded at the first question. One question at a time."""

    def __init__(self, run: Run | None, catalogue: Catalogue) -> None:
        self._run, self._catalogue = run, catalogue
        self._lock = threading.Lock()
        self._loaded: tuple[str, Pipeline] | None = None

    @property
    def possible(self) -> bool:
        return self._run is not None and self._catalogue.known and self._run.repository.exists()

    def _pipeline(self) -> Pipeline:
        from serving.runtime.pipeline import Pipeline

        assert self._run is not None
        version, store = str(self._run.repository.resolve()), self._catalogue.store()
        assert store is not None
        if self._loaded is None or self._loaded[0] != version:
            self._loaded = version, Pipeline.published(self._run.root, store)
        return self._loaded[1]

    def of(self, user: str, history: Sequence[PastEvent], top_k: int, item: str, language: str) -> dict[str, Any]:
        """``sentence``, ``reasons`` (``item``, ``title``, ``drop``, ``place``) and ``smallest`` of one item of the
        answer. Raises ValueError where there is none."""
        import numpy as np

        from serving.runtime.stages import parse_row
        from serving.runtime.why import Counterfactuals, because, sentence
        from vivace.client_request import request_tensors

        with self._lock:
            pipeline = self._pipeline()
            events = request_tensors(user, history, top_k)[2][1][0] if history else np.array([], object)
            row = parse_row(user.encode(), b"", events, top_k)
            ids = Counterfactuals(pipeline, row).shown()
            shown = [name.decode() for name in pipeline.respond.names_of(ids)]
            if item not in shown:
                raise ValueError(
                    f"{item}: the models alone do not put it among the first {top_k}; live counts, new items or "
                    "business rules did"
                )
            (of,) = because(pipeline, row, [shown.index(item)])
        named = list({i for i in (*(r.item for r in of.reasons), *of.smallest, of.item)})
        titles = {card["id"]: card["title"] for card in self._catalogue.cards(named)}
        reasons = [
            {
                "item": r.item,
                "title": titles[r.item],
                "drop": r.drop if np.isfinite(r.drop) else None,
                "place": r.place,
            }
            for r in of.reasons
        ]
        return {
            "sentence": sentence(of, titles, language),
            "reasons": reasons,
            "smallest": [{"item": i, "title": titles[i]} for i in of.smallest],
            "source": "asked of this run's graphs, beside the server",
        }
