"""What a run knows of items and people beside the server: titles, attributes, prices, stored histories, what is new and
what is rising. Without the run at hand the page shows ids alone."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from vivace import contract
from vivace.run import Run

if TYPE_CHECKING:
    import pandas as pd

    from vivace.store.interface import ServingStore

T = TypeVar("T")
FRESH_S = 2.0  # how long what is new and rising is remembered
RISING_MS, RISING_CLICKS, RISING_ITEMS = 3_600_000, 3, 20  # within that time, at least so often, at most so many
MILLISECONDS = "_ms"  # how the name of a number ends that is a moment
LISTED = 5  # values of a list that are shown of an item
ORDER = ("view", "click", "watch", "listen", "cart", "buy", "purchase")  # of event types, others behind by name


def remembered(seconds: float) -> Callable[[Callable[[Any], T]], Callable[[Any], T]]:
    """A method without arguments whose value is kept so long."""

    def decorate(method: Callable[[Any], T]) -> Callable[[Any], T]:
        name = f"_{method.__name__}_kept"

        def kept(self: Any) -> T:
            until, value = self.__dict__.get(name, (0.0, None))
            if until < time.monotonic():
                value = method(self)
                self.__dict__[name] = (time.monotonic() + seconds, value)
            return value  # type: ignore[no-any-return]

        return kept

    return decorate


class Catalogue:
    """Of one run; ``run`` None: nothing is known. For any number of threads."""

    def __init__(self, run: Run | None) -> None:
        self._run = run if run is not None and run.feature_store.is_dir() else None
        self._lock = threading.Lock()
        self._opened: tuple[int, ServingStore] | None = None

    @property
    def stores(self) -> bool:
        """Whether stored histories can be read."""
        return self.store() is not None

    # -- the store ------------------------------------------------------------------------------------
    def store(self) -> ServingStore | None:
        """Read only; opened again where its file was written anew. None where the run came without."""
        if self._run is None:
            return None
        from vivace.store.opening import STORE_URL, store_of_worker

        file = self._run.feature_store / "data.mdb"
        if not file.exists() and not os.environ.get(STORE_URL):
            return None
        number = file.stat().st_ino if file.exists() else 0
        with self._lock:
            if self._opened is None or self._opened[0] != number:
                if self._opened is not None:
                    self._opened[1].close()
                self._opened = number, store_of_worker(self._run.feature_store, readonly=True)
            return self._opened[1]

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = None

    # -- items ----------------------------------------------------------------------------------------
    @cached_property
    def schema(self) -> contract.DataSchema | None:
        try:
            return self._run.schema() if self._run is not None else None
        except FileNotFoundError:
            return None

    @cached_property
    def _items(self) -> pd.DataFrame | None:
        """Rows of the catalogue by item id; None where the run came without."""
        from preprocessing.features import CATALOGUE_FILE

        if self._run is None or self.schema is None or not (self._run.features / CATALOGUE_FILE).exists():
            return None
        import pandas as pd

        columns = [contract.ITEM, *self.schema.item_columns]
        return pd.read_parquet(self._run.features / CATALOGUE_FILE, columns=columns).set_index(contract.ITEM)

    @cached_property
    def _common(self) -> dict[str, Counter[str]]:
        """By attribute of several values: of how many items each value is."""
        lists, items = self.schema.item_lists if self.schema else (), self._items
        rows = {name: () if items is None else items[name] for name in lists}
        return {name: Counter(v for row in rows[name] if row is not None for v in row) for name in lists}

    @remembered(FRESH_S)
    def _changed(self) -> dict[str, dict[str, Any]]:
        """Rows that the running server was sent since, by item id; what was taken out is not among them."""
        store = self.store()
        changes = store.catalogue_changes(0) if store is not None else []
        return {change.item_id: json.loads(change.row) for change in changes if not change.removed}

    @remembered(FRESH_S)
    def rising(self) -> set[str]:
        """Items with the most live events of the last hour, of those that have some."""
        store = self.store()
        if store is None:
            return set()
        since = int(time.time() * 1000) - RISING_MS
        _, events = store.live_events(0, since, 100_000)
        counts = Counter(event.item_id for event in events if event.timestamp_ms >= since and not event.shown)
        return {item for item, count in counts.most_common(RISING_ITEMS) if count >= RISING_CLICKS}

    def cards(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Of each item its ``id``, ``title``, ``price`` (or None), ``attributes``, its ``kind`` (category, or else the
        first value of its first attribute) and whether it is ``new``: sent to the running server and in no trained
        table. An item of which nothing is known has its id as its title."""
        changed, items = self._changed(), self._items
        known = items.index if items is not None else ()
        cards = []
        for item in ids:
            row: dict[str, Any] = changed.get(item) or {}
            if not row and items is not None and item in known:
                row = items.loc[item].to_dict()
            cards.append(self._card(item, row, item in changed and item not in known))
        return cards

    def _card(self, item: str, row: dict[str, Any], new: bool) -> dict[str, Any]:
        numbers = self.schema.item_continuous if self.schema else ()
        named = {
            name: self._values(name, row.get(name)) for name in (self.schema.item_attributes if self.schema else ())
        }
        named = {name: values for name, values in named.items() if values and name != "price"}
        more = {name: f" and {len(v) - LISTED} more" if len(v) > LISTED else "" for name, v in named.items()}
        price = row.get("price") if "price" in numbers else None
        return {
            "id": item,
            "title": _text(row.get(contract.TITLE)) or item,
            "price": None if price is None or price != price else round(float(price), 2),
            "attributes": {name: ", ".join(values[:LISTED]) + more[name] for name, values in named.items()},
            "kind": (named.get("category") or next(iter(named.values()), [""]))[0],
            "new": new,
        }

    def _values(self, name: str, value: Any) -> list[str]:
        """Of an attribute as texts; those of a list that most items have come first. A number says what it is of."""
        if name not in self._common:
            text = _day(value) if name.endswith(MILLISECONDS) else _text(value)
            return [f"{name.removesuffix(MILLISECONDS)} {text}" if _is_number(text) else text] if text else []
        common = self._common[name]
        return sorted(map(str, value if value is not None else ()), key=lambda text: (-common[text], text))

    def find_items(self, words: str, most: int) -> list[dict[str, Any]]:
        """Items whose title has all the words, or whose id is these; new ones first."""
        parts = words.lower().split()
        new = [i for i, row in self._changed().items() if _has(f"{i} {row.get(contract.TITLE) or ''}", parts)]
        ids = new[:most]
        if self._items is not None and parts:
            titles = self._items[contract.TITLE].fillna("").str.lower()
            keep = titles.index.str.lower() == words.lower().strip()
            every = titles.str.contains(parts[0], regex=False)
            for part in parts[1:]:
                every &= titles.str.contains(part, regex=False)
            ids += [i for i in titles.index[(keep | every)][: most + len(ids)] if i not in ids]
        return self.cards(ids[:most])

    def _recorded_types(self) -> set[str]:
        """Event types of recorded requests."""
        from preprocessing.requests import recorded, requests_of

        if self._run is None or not self._run.requests_file().exists():
            return set()
        return {kind for request in requests_of(recorded(self._run.root)) for kind in request.types or () if kind}

    # -- people ---------------------------------------------------------------------------------------
    @cached_property
    def _people(self) -> list[tuple[str, int]]:
        """Users of recorded requests, and how many events each has in them."""
        from preprocessing.requests import recorded

        if self._run is None or not self._run.requests_file().exists():
            return []
        frame = recorded(self._run.root)
        return list(zip(frame[contract.USER], map(len, frame[contract.ITEM]), strict=True))

    def people(self, words: str, most: int) -> list[dict[str, Any]]:
        """Held-out users whose id has ``words``: ``id`` and ``events``."""
        words = words.lower()
        found = ((user, count) for user, count in self._people if words in user.lower())
        return [{"id": user, "events": count} for (user, count), _ in zip(found, range(most), strict=False)]

    def some_users(self) -> list[str]:
        return [user for user, _ in self._people[:1000]]

    def history(self, user: str) -> list[dict[str, Any]] | None:
        """Stored events of a user, oldest first: ``item``, ``type`` and ``time`` (Unix ms); None of a stranger."""
        store = self.store()
        stored = store.typed_histories([user])[0] if store is not None and user else None
        if stored is None:
            return None
        return [{"item": i, "type": t, "time": w} for i, t, w in zip(*stored, strict=True)]

    @cached_property
    def event_types(self) -> list[str]:
        """Of the data set, the weakest first; [] where its events have none."""
        store = self.store()
        types = store.event_types() if store is not None else self._recorded_types()
        return sorted(types, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _has(text: str, parts: Iterable[str]) -> bool:
    text = text.lower()
    return all(part in text for part in parts)


def _text(value: Any) -> str:
    """A value as text, "" for what is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _is_number(text: str) -> bool:
    """Whether a text says nothing without the name of its attribute: 281, or 2017-10-02."""
    return text.replace("-", "").replace(".", "").isdigit()


def _day(value: Any) -> str:
    """A moment in Unix ms as its day, UTC; as it is where it is none."""
    try:
        return datetime.fromtimestamp(float(value) / 1000, UTC).date().isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        return _text(value)
