"""The person's view: who, what is in the history, what is asked for, and the answer with its reasons."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vivace import contract
from vivace.cli.page.catalogue import Catalogue
from vivace.cli.page.served import Served
from vivace.cli.query import ADVICE
from vivace.client import Recommendation
from vivace.client_explain import Explanation
from vivace.client_request import PastEvent
from vivace.explain_contract import ENGLISH, HISTORY

TOP_K, MOST, SUGGESTED = 12, 48, 8
WHAT_IT_MEANS = {
    **ADVICE,
    contract.STATUS_OK: "",
    "popular items": "Nothing is known of this person yet, so these are what most people take.",
    "load: ": "The server is busy, so it did less work for this answer.",
    "store: ": "The store of histories cannot be read just now.",
    "shards: ": "A part of the catalogue does not answer just now.",
    "no search": "This run has no search; the words were left out.",
}


def in_words(status: str) -> str:
    """What a STATUS means to someone who looks at the answer."""
    if status == contract.STATUS_OK:
        return "Answered in full, from everything that was given."
    said = [words for key, words in WHAT_IT_MEANS.items() if key in status and words]
    if contract.STATUS_RULES in status:
        said.append("Business rules changed this answer.")
    return " ".join(said)


def _past(history: Any) -> list[PastEvent] | None:
    """The edited history of a request of the page: [{"item", "type", "time"}]; None where it has none."""
    if history is None:
        return None
    if not isinstance(history, list) or len(history) > contract.MAX_SEEN:
        raise ValueError(f"history: expected a list of at most {contract.MAX_SEEN} events")
    events: list[PastEvent] = []
    for place, event in enumerate(history):
        if not isinstance(event, dict) or not isinstance(event.get("item"), str):
            raise ValueError(f"history[{place}]: expected an object with item, type and time, got {event!r:.60}")
        kind, moment = event.get("type", ""), event.get("time", 0)
        whole = (event["item"], kind, moment) if moment else (event["item"], kind)
        events.append(whole if kind or moment else event["item"])
    return events


def _number(raw: Mapping[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name}: expected {least:g}..{most:g}, got {value!r:.60}")
    return value


def _words(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {type(value).__name__}")
    return value


def _request(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``client.recommend`` and ``explain``. Raises ValueError."""
    history, query = _past(raw.get("history")), _words(raw, "query").strip()
    filters, diversity = raw.get("filters") or None, _number(raw, "diversity", 0, 1, 0.0)
    return {
        "user_id": ""
        if history == []
        else _words(raw, "user"),  # an empty HISTORY means the stored one; nobody has none
        "history": history or (),
        "top_k": int(_number(raw, "top_k", 1, MOST, TOP_K)),
        "query": query,
        "filters": filters if query else None,
        "diversity": diversity if query else 0.0,
    }


class Person:
    """What the view asks for, as plain values of JSON. Methods raise ValueError for what is wrong in a request, and
    what ``Served.call`` raises."""

    def __init__(self, served: Served, catalogue: Catalogue) -> None:
        self._served, self._catalogue = served, catalogue

    def people(self, words: str) -> list[dict[str, Any]]:
        return self._catalogue.people(words, SUGGESTED)

    def items(self, words: str) -> list[dict[str, Any]]:
        return self._catalogue.find_items(words, SUGGESTED)

    def history(self, user: str) -> dict[str, Any]:
        """``known``, and ``events`` oldest first, each with the card of its item."""
        events = self._catalogue.history(user)
        return {"known": events is not None, "events": self._with_cards(events or [])}

    def _with_cards(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        cards = self._catalogue.cards([event["item"] for event in events])
        return [{**event, "card": card} for event, card in zip(events, cards, strict=True)]

    def recommend(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to ``user``, ``history`` (None: the stored one), ``query``, ``filters``, ``diversity``."""
        request, history = _request(raw), _past(raw.get("history"))
        began = time.perf_counter()
        answer = self._served.call(lambda client: client.recommend(**request))
        took = (time.perf_counter() - began) * 1000
        seen = self._seen(request["user_id"], history)
        return {
            "items": self._items(answer, seen), "status": answer.status, "words": in_words(answer.status),
            "degraded": answer.degraded, "understood": _understood(answer.understood),
            "request_id": answer.request_id, "ms": round(took, 1),
        }  # fmt: skip

    def why(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Reasons of each item of the answer to the same request, by item id: ``sentence``, ``parts``, ``smallest`` and
        ``path``. ``language``: of the sentences."""
        request, language = _request(raw), _words(raw, "language") or ENGLISH
        explained = self._served.call(lambda client: client.explain(**request, language=language))
        return {of.item: self._reasons(of) for of in explained.items}

    def _reasons(self, of: Explanation) -> dict[str, Any]:
        """``parts``, the largest effect first: ``name``, ``effect`` (None: without it the item is no candidate) and
        ``place``, where the item then stands (None: nowhere); ``path``: a sentence, "" where nothing is shared."""
        ids = [*(i for reason in of.reasons for i in reason.get("events", [])), *of.smallest]
        titles = {card["id"]: card["title"] for card in self._catalogue.cards(ids)}
        parts = []
        for reason in of.reasons:
            name = titles[reason["events"][0]] if reason["kind"] == HISTORY else reason.get("name") or reason["kind"]
            value = f" {reason['value']}" if "value" in reason else ""
            value += ", which training did not know" if reason.get("unknown") else ""
            parts.append({"name": f"{name}{value}", "effect": reason["effect"], "place": reason["rank"]})
        return {
            "sentence": of.sentence, "parts": parts, "smallest": [titles[i] for i in of.smallest],
            "path": of.path.get("sentence", ""),
        }  # fmt: skip

    def _seen(self, user: str, history: Sequence[PastEvent] | None) -> set[str]:
        if history is None:
            return {event["item"] for event in self._catalogue.history(user) or []}
        return {event[0] if isinstance(event, tuple) else str(event) for event in history}

    def _items(self, answer: Recommendation, seen: set[str]) -> list[dict[str, Any]]:
        rising, found_by = self._catalogue.rising(), answer.understood.get("found_by", {})
        items = []
        for place, card in enumerate(self._catalogue.cards(answer.items)):
            flags = {"new": card.pop("new"), "rising": card["id"] in rising, "seen": card["id"] in seen}
            heads = {name: round(float(values[place]), 4) for name, values in answer.heads.items()}
            items.append(
                {
                    **card, "place": place + 1, "score": round(float(answer.scores[place]), 4), "heads": heads,
                    "badges": [name for name, there in flags.items() if there],
                    "found_by": found_by.get(card["id"], []),
                }
            )  # fmt: skip
        return items

    def append(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Stores one event of ``user``; the length of the history and STATUS."""
        user, item = _words(raw, "user"), _words(raw, "item")
        if not user:
            raise ValueError("Choose a person first: an event belongs to someone.")
        appended = self._served.call(
            lambda client: client.append(user, item, _words(raw, "type"), request_id=_words(raw, "request_id"))
        )
        return {"length": int(appended), "status": appended.status}


def _understood(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a query was taken for, without what is said of each item."""
    return {key: value for key, value in record.items() if key != "found_by"}
