"""The client's call that says why: what each item of an answer hangs on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vivace.client_errors import Limit, VivaceError
from vivace.client_request import PastEvent, limits, request_tensors
from vivace.contract import ITEM_ID, SCORE, STATUS
from vivace.explain_contract import ENGLISH, EXPLAIN, EXPLANATION, LANGUAGE, LANGUAGES


@dataclass(frozen=True)
class Explanation:
    """Of one item: ``reasons``, the largest effect first, as docs/explanations.md has them; ``smallest``: the least
    items of the history without which it would not be shown, [] where none was found; ``sentence``: that in words;
    ``path``: what joins it to a reason in the catalogue, {} where nothing does."""

    item: str
    score: float
    reasons: list[dict[str, Any]]
    smallest: list[str]
    sentence: str
    path: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Explained:
    """An answer with its reasons, best item first."""

    items: list[Explanation]
    status: str


def language_parameter(language: str, more: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call with the language of its sentences. Raises ValueError."""
    if language not in LANGUAGES:
        raise ValueError(f"language: expected one of {', '.join(LANGUAGES)}, got {language!r:.60}")
    return more | {"parameters": more.get("parameters", {}) | {LANGUAGE: language}}


def explanation_of(item: str, score: float, of: dict[str, Any]) -> Explanation:
    """``of``: an item's EXPLANATION. Raises KeyError."""
    return Explanation(item, score, of["reasons"], of["smallest"], of["sentence"], of.get("path", {}))


def read_explained(result: Any) -> Explained:
    """The answer of an ``explain`` call; raises VivaceError for one that is none."""
    try:
        items, scores, texts = (result.as_numpy(t.name)[0].tolist() for t in (ITEM_ID, SCORE, EXPLANATION))
        explanations = []
        for item, score, text in zip(items, scores, texts, strict=True):
            explanations.append(explanation_of(item.decode(), score, json.loads(text)))
        return Explained(explanations, result.as_numpy(STATUS.name)[0, 0].decode())
    except Exception as error:
        raise VivaceError(f"the answer is not one of a Vivace server: {type(error).__name__}: {error}") from error


class ExplainCalls:
    """Of ``VivaceClient``."""

    _timeout_s: float

    def _infer(self, model: str, tensors: Any, limit: Limit | None = None, **more: Any) -> Any:
        raise NotImplementedError

    def explain(
        self,
        user_id: str = "",
        history: Sequence[PastEvent] = (),
        top_k: int = 5,
        query: str = "",
        within_ms: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        diversity: float = 0.0,
        context: Mapping[str, Any] | None = None,
        language: str = ENGLISH,
    ) -> Explained:
        """Why ``recommend`` answers what it does to the same values: that answer, with the reasons of each item.
        ``language``: of the sentences, "en" or "zh". It is as much work as several calls of ``recommend``. Raises as
        that does."""
        tensors = request_tensors(user_id, history, top_k, query, context)
        more = language_parameter(language, limits(within_ms, filters, diversity))
        return read_explained(self._infer(EXPLAIN, tensors, Limit(self._timeout_s, within_ms), **more))


class AsyncExplainCalls:
    """The same for asyncio."""

    _timeout_s: float

    async def _infer(self, model: str, tensors: Any, limit: Limit | None = None, **more: Any) -> Any:
        raise NotImplementedError

    async def explain(
        self,
        user_id: str = "",
        history: Sequence[PastEvent] = (),
        top_k: int = 5,
        query: str = "",
        within_ms: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        diversity: float = 0.0,
        context: Mapping[str, Any] | None = None,
        language: str = ENGLISH,
    ) -> Explained:
        """See ``ExplainCalls.explain``."""
        tensors = request_tensors(user_id, history, top_k, query, context)
        more = language_parameter(language, limits(within_ms, filters, diversity))
        return read_explained(await self._infer(EXPLAIN, tensors, Limit(self._timeout_s, within_ms), **more))
