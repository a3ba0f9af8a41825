"""Answers by business rules (``rules``): which items they hold for, and the ranking that they make of one.

The file is looked at once a second, and what a row of the catalogue that was put in live says counts from then on.
Axis legend: B rows, N candidates, C values of a candidate (its score, then a probability a head), K answered items, V
ids of the trained tables, R rules.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.runtime.explore import COUNTS_FILE, FEW
from serving.runtime.response import ResponseStage
from serving.runtime.rules import (
    BLOCK,
    BOOST,
    BURY,
    CAP,
    NEW,
    PIN,
    Rule,
    RulesError,
    Where,
    deal_places,
    parse_rules,
    read_rules,
)
from vivace.contract import FIRST_ID, STATUS_ERROR, STATUS_RULES, DataSchema

log = logging.getLogger("vivace.rules")

ATTRIBUTES, SCHEMA = "attributes.parquet", "schema.json"  # of a version's response
LOOK_S = 1.0


def write_attributes(catalogue: Path, schema: DataSchema, path: Path) -> None:
    """The attributes of a run's catalogue, in the order of ids from FIRST_ID, for a version."""
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(catalogue, columns=list(schema.item_attributes)), path)


class ItemAttributes:
    """What a version knows of its items, in the order of ids from FIRST_ID."""

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq  # a server without rules does without

        if not (folder / ATTRIBUTES).exists():
            raise FileNotFoundError(
                f"rules: {folder / ATTRIBUTES} is not there; 'vivace compile' makes a version with it"
            )
        self.schema = DataSchema.from_json(json.loads((folder / SCHEMA).read_text(encoding="utf-8")))
        table = pq.read_table(folder / ATTRIBUTES)
        self._columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._values: dict[str, list[Any]] = {}  # of attributes that something is capped by
        self._size = FIRST_ID + table.num_rows
        self.new_V = np.load(folder / COUNTS_FILE, allow_pickle=False) < FEW
        """Items of few training events."""

    def matching(self, where: Where, names: np.ndarray) -> np.ndarray:
        """bool [V]: whether ``where`` holds for each id. ``names``: raw ids as bytes, object [V]."""
        import pyarrow as pa
        import pyarrow.compute as pc

        out = np.zeros(self._size, bool)
        out[FIRST_ID:] = True
        for name, wanted in where.values:
            column, values = self._columns[name], pa.array(sorted(wanted), pa.string())
            if pa.types.is_list(column.type):
                has = np.zeros(len(column), bool)
                found = pc.is_in(pc.list_flatten(column), value_set=values)
                has[pc.list_parent_indices(column).to_numpy()[found.to_numpy(zero_copy_only=False)]] = True
            else:
                has = pc.is_in(column, value_set=values).to_numpy(zero_copy_only=False)
            out[FIRST_ID:] &= has
        for name, low, high in where.ranges:
            numbers = self._columns[name].to_numpy(zero_copy_only=False).astype(np.float64)
            out[FIRST_ID:] &= (numbers >= low) & (numbers <= high)  # False of what is missing
        if where.items is not None:
            wanted_bytes = {item.encode() for item in where.items}
            out[FIRST_ID:] &= np.fromiter((n in wanted_bytes for n in names[FIRST_ID:]), bool, len(names) - FIRST_ID)
        return out

    def values(self, name: str, id_: int) -> tuple[Hashable, ...]:
        """Of an attribute of an item; () for none."""
        if name not in self._values:
            self._values[name] = self._columns[name].to_pylist()
        value = self._values[name][id_ - FIRST_ID]
        return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _values_of(row: dict[str, Any], name: str) -> tuple[Hashable, ...]:
    value = row.get(name)
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


class _Book:
    """Rules as they hold for items: those of the tables, and those whose rows changed since."""

    def __init__(self, rules: tuple[Rule, ...], items: ItemAttributes, respond: ResponseStage) -> None:
        self.rules, self._items, self._respond = rules, items, respond
        known = [rule.where != Where() for rule in rules]
        self._holds = [items.matching(r.where, respond.names) if k else None for r, k in zip(rules, known, strict=True)]
        pinned = {item.encode() for rule in rules for item in rule.pinned}
        self._pinned = {name.decode(): id_ for id_, name in enumerate(respond.names.tolist()) if name in pinned}
        self._matched: dict[str, tuple[dict[str, Any], np.ndarray]] = {}  # of changed rows: of R rules
        self._changed, self._of_changed = np.zeros(0, np.int64), np.zeros((len(rules), 0), bool)
        self._rows: dict[int, dict[str, Any]] = {}
        self._number = -1

    def follow(self) -> None:
        """Takes in what changed of the catalogue."""
        catalogue = self._respond.catalogue
        if catalogue is None or catalogue.number == self._number:
            return
        self._number = catalogue.number
        matched, self._rows = dict[str, tuple[dict[str, Any], np.ndarray]](), {}
        for item, row in catalogue.rows.items():
            if row is None:
                continue
            before = self._matched.get(item)
            if before is None or before[0] is not row:
                before = (row, np.array([rule.where.matches(item, row) for rule in self.rules], bool))
            matched[item], self._rows[catalogue.ids[item]] = before, row
        self._matched = matched
        ids = np.array([catalogue.ids[item] for item in matched], np.int64)
        order = np.argsort(ids)
        self._changed = ids[order]
        stacked = (
            np.stack([holds for _, holds in matched.values()], 1) if matched else np.zeros((len(self.rules), 0), bool)
        )
        self._of_changed = stacked[:, order]

    def holds(self, rule: int, ids: np.ndarray) -> np.ndarray:
        """bool of ids' shape."""
        table = self._holds[rule]
        if table is None:
            return np.ones(ids.shape, bool)
        out: np.ndarray = table[np.minimum(ids, len(table) - 1)] & (ids < len(table))
        if len(self._changed):
            at = np.minimum(np.searchsorted(self._changed, ids), len(self._changed) - 1)
            changed = self._changed[at] == ids
            out = np.where(changed, self._of_changed[rule][at], out)
        return out

    def is_new(self, id_: int) -> bool:
        """Whether an item came after the version was made, or has FEW training events and less."""
        return self._is_fresh(id_) or bool(self._items.new_V[id_])

    def _is_fresh(self, id_: int) -> bool:
        return id_ >= len(self._respond.names)

    def groups(self, name: str, id_: int) -> tuple[Hashable, ...]:
        row = self._rows.get(id_)
        if row is not None:
            return _values_of(row, name)
        return () if self._is_fresh(id_) else self._items.values(name, id_)

    def pins(self, rule: Rule) -> Iterator[tuple[int, int]]:
        """(least place from 0, id) of the items that may be answered."""
        catalogue = self._respond.catalogue
        for item in rule.pinned:
            id_ = self._pinned.get(item, 0)
            if catalogue is not None and item in catalogue.rows:
                id_ = 0 if catalogue.rows[item] is None else catalogue.ids[item]
            if id_:
                yield rule.place - 1, id_


class Rules:
    """The rules of a file over a version's items; followed from one call to the next.

    ``path``: where they are, there or not; ``folder``: of the version's response stage."""

    def __init__(self, path: Path, folder: Path, respond: ResponseStage) -> None:
        self._path, self._folder, self._respond = path, folder, respond
        self._book: _Book | None = None
        self._items: ItemAttributes | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._looked = -math.inf
        self.error = ""  # why the file is not as it is followed

    def look(self) -> None:
        """Reads the file where it changed. One that cannot be read leaves what there was."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            stamp = None
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._book = None if stamp is None else self._read()
            self.error = ""
        except (RulesError, OSError) as error:
            self.error = f"{self._path.name}: {error}"
            log.warning("%s; the rules before it stay", self.error)

    def _read(self) -> _Book | None:
        text = read_rules(self._path)
        self._items = self._items or ItemAttributes(self._folder)
        rules = parse_rules(text, self._items.schema)
        return _Book(rules, self._items, self._respond) if rules else None

    @property
    def stamp(self) -> str:
        """Of the file that is followed; "" where there is none."""
        self.look()
        return "" if self._stamp is None else str(self._stamp)

    @property
    def exact(self) -> bool:
        """Whether places are given out by rules, so that nothing else may be put in them."""
        return self._book is not None and deal_places(self._book.rules)

    def buries(self, ids: np.ndarray) -> np.ndarray:
        """bool of ids' shape: which items a rule puts behind all others where nobody searches."""
        book = self._book
        rules = [] if book is None else [i for i, r in enumerate(book.rules) if r.do == BURY and r.applies(False)]
        return np.any([np.zeros(ids.shape, bool), *(book.holds(i, ids) for i in rules if book)], axis=0)

    def __call__(
        self, ranked_BN: np.ndarray, values_BCN: np.ndarray, top_k_B: np.ndarray, queried_B: Sequence[bool],
        status_B: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """Ids int64 [B, N] and values float32 [B, C, N] by the rules, and STATUS that names those which changed the
        answer. The given arrays stay."""
        self.look()
        book = self._book
        if book is None:
            return ranked_BN, values_BCN, status_B
        book.follow()
        ranked_BN, values_BCN, status_B = ranked_BN.copy(), values_BCN.copy(), status_B.copy()
        for row, status in enumerate(status_B.tolist()):
            if status.startswith(STATUS_ERROR.encode()):
                continue
            chosen = [i for i, rule in enumerate(book.rules) if rule.applies(bool(queried_B[row]))]
            names = _apply(book, chosen, ranked_BN[row], values_BCN[row], int(top_k_B[row]))
            if names:
                status_B[row] = status + f"; {STATUS_RULES}{', '.join(names)}".encode()
        return ranked_BN, values_BCN, status_B


def _apply(book: _Book, chosen: list[int], ranked_N: np.ndarray, values_CN: np.ndarray, top_k: int) -> list[str]:
    """Changes a row in its place; the names of the rules that changed its first ``top_k``."""
    n = int(np.count_nonzero(ranked_N))
    ids, k = ranked_N[:n].copy(), min(top_k, n)
    keep, key, told = np.ones(n, bool), np.arange(n, dtype=np.float64), set[int]()
    moved = list[tuple[int, np.ndarray]]()
    for i in chosen:
        rule = book.rules[i]
        if rule.do not in (BLOCK, BOOST, BURY):
            continue
        holds = book.holds(i, ids)
        if rule.do == BLOCK:
            keep &= ~holds
            if holds[:k].any():
                told.add(i)
        else:
            key += holds * (-(rule.places + 0.5) if rule.do == BOOST else n)
            moved.append((i, holds))
    order = np.argsort(key, kind="stable")
    order = order[keep[order]]
    for i, holds in moved:
        without = np.flatnonzero(keep)
        here = len(without[:k])
        changed = order[:here] != without[:here]
        if (holds[order[:here]] & changed).any() or (holds[without[:here]] & changed).any():
            told.add(i)
    rules = [(i, book.rules[i]) for i in chosen]
    if deal_places(rule for _, rule in rules):
        places = _Dealing(book, rules, ids, order, told).places(top_k)
        _put(ranked_N, values_CN, *_with_values(places, values_CN, order))
    else:
        _put(ranked_N, values_CN, ids[order], values_CN[:, order])
    return [book.rules[i].name for i in sorted(told)]


def _put(ranked_N: np.ndarray, values_CN: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
    n = min(len(ids), len(ranked_N))
    values = values[:, :n].copy()
    ranked_N[:], values_CN[:] = 0, 0
    ranked_N[:n], values_CN[:, :n] = ids[:n], values


Place = tuple[int, int]  # candidate, -1 for an item that no model proposed; id


def _with_values(places: list[Place], values_CN: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of dealt places. A pinned item that no model proposed has the score of the one whose place it
    took, and no probability (0)."""
    values = np.zeros((len(values_CN), len(places)), np.float32)
    for place, (candidate, _) in enumerate(places):
        if candidate >= 0:
            values[:, place] = values_CN[:, candidate]
        elif len(order):
            values[0, place] = values_CN[0, order[min(place, len(order) - 1)]]
    return np.array([id_ for _, id_ in places], np.int64), values


class _Dealing:
    """Deals the places of one answer by what pins, caps and room for new items ask. ``ids`` int64 [n]: candidates;
    ``order``: which of them may be shown, best first; ``told``: takes the rules that changed something."""

    def __init__(
        self, book: _Book, rules: list[tuple[int, Rule]], ids: np.ndarray, order: np.ndarray, told: set[int]
    ) -> None:
        self._book, self._ids, self._order, self._told = book, ids.tolist(), order.tolist(), told
        self._pins, self._caps, self._news, self._blocks = (
            [(i, rule) for i, rule in rules if rule.do == kind] for kind in (PIN, CAP, NEW, BLOCK)
        )
        every = np.array([*self._ids, *(id_ for _, rule in self._pins for _, id_ in book.pins(rule))], np.int64)
        self._capped = {i: dict(zip(every.tolist(), book.holds(i, every).tolist(), strict=True)) for i, _ in self._caps}
        self._known: dict[int, list[tuple[int, tuple[int, Hashable]]]] = {}
        self._taken = Counter[tuple[int, Hashable]]()  # items shown, by cap and value
        self._share = max((rule.share for _, rule in self._news), default=0.0)

    def places(self, count: int) -> list[Place]:
        """The first ``count`` places, fewer where candidates end. No cap is ever broken."""
        fixed = self._fixed(count)  # they take their part of the caps first
        shown, out, new = {id_ for id_, _ in fixed.values()}, list[Place](), 0
        waiting = [c for c in self._order if self._ids[c] not in shown]
        while len(out) < count:
            if (pin := fixed.pop(len(out), None)) is not None:
                id_, rule = pin
                candidate = next((c for c in self._order if self._ids[c] == id_), -1)
                self._told.add(rule)
                out.append((candidate, id_))
            elif (chosen := self._next(waiting, new < math.floor(self._share * (len(out) + 1) + 1e-9))) >= 0:
                waiting.remove(chosen)
                self._take(self._ids[chosen])
                out.append((chosen, self._ids[chosen]))
            elif fixed:  # fewer candidates than the place of a pin: it comes behind the last one
                fixed[len(out)] = fixed.pop(min(fixed))
                continue
            else:
                break
            new += self._book.is_new(out[-1][1])
        return out

    def _fixed(self, count: int) -> dict[int, tuple[int, int]]:
        """By place: the pinned item and its rule."""
        fixed: dict[int, tuple[int, int]] = {}
        for i, rule in self._pins:
            for place, id_ in self._book.pins(rule):
                free = next(p for p in range(place, place + len(fixed) + 1) if p not in fixed)
                blocked = any(self._book.holds(block, np.array([id_]))[0] for block, _ in self._blocks)
                if free < count and not blocked and id_ not in (o for o, _ in fixed.values()) and self._fits(id_):
                    self._take(id_)
                    fixed[free] = (id_, i)
        return fixed

    def _next(self, waiting: list[int], wants_new: bool) -> int:
        """The candidate for the next place, -1 for none; those that break a cap leave ``waiting``, as they always
        will."""
        if wants_new:
            newest = next((c for c in waiting if self._book.is_new(self._ids[c]) and self._fits(self._ids[c])), -1)
            if newest >= 0:
                if newest != waiting[0]:
                    self._told.update(i for i, rule in self._news if rule.share == self._share)
                return newest
        while waiting:
            if self._fits(self._ids[waiting[0]]):
                return waiting[0]
            full = [g for most, g in self._groups(self._ids[waiting.pop(0)]) if self._taken[g] >= most]
            self._told.update(i for i, _ in full)
        return -1

    def _groups(self, id_: int) -> list[tuple[int, tuple[int, Hashable]]]:
        """(how many of it may be shown, (cap, value)) of an item."""
        if id_ not in self._known:
            self._known[id_] = [
                (rule.most, (i, value))
                for i, rule in self._caps
                if self._capped[i][id_]
                for value in self._book.groups(rule.by, id_)
            ]
        return self._known[id_]

    def _fits(self, id_: int) -> bool:
        return all(self._taken[group] < most for most, group in self._groups(id_))

    def _take(self, id_: int) -> None:
        self._taken.update(group for _, group in self._groups(id_))
