"""The live catalogue of a server: what the store's log of changes says since the run was compiled.

Every process follows the log for itself: before it answers it asks for the number of the newest change, which takes
microseconds, and reads what is new. So what was acknowledged is in the next answer, of whichever process.
Axis legend: F fresh items, D width, C categorical, A list and M continuous attributes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.item_rows import sold_out
from serving.runtime.new_items import Attributes, CompiledRows, NewItem, NewItems
from vivace.contract import FIRST_ID, MAX_FRESH, StageTensors
from vivace.store.interface import Change, ServingStore, StoreError

log = logging.getLogger(__name__)
ItemIds = Callable[[Sequence[str]], np.ndarray]


class FreshItems:
    """Items that are not in the trained tables, each in a place of its own. Arrays grow; what is taken out stays in its
    place, not ``alive``, until another item needs it."""

    def __init__(self, width: int, like: Attributes) -> None:
        """``like``: attributes of the shapes that all items' have."""
        self.count = 0
        self.place: dict[str, int] = {}
        self._free: list[int] = []
        self._width, self._like = width, like
        self._grow(64)

    def _grow(self, size: int) -> None:
        width, like = self._width, self._like._asdict()
        old = self.__dict__.get("_arrays", {})
        self._arrays: dict[str, np.ndarray] = {
            "vectors": np.zeros((size, width), np.float32), "biases": np.zeros(size, np.float32),
            "slots": np.zeros(size, np.int64), "nearest": np.zeros(size, np.int64), "alive": np.zeros(size, bool),
            **{name: np.zeros((size, *values.shape), values.dtype) for name, values in like.items()},
        }  # fmt: skip
        for name, values in old.items():
            self._arrays[name][: self.count] = values[: self.count]

    def of(self, name: str) -> np.ndarray:
        """One of the arrays, [F, …]."""
        return self._arrays[name][: self.count]

    @property
    def alive(self) -> int:
        return int(self.of("alive").sum())

    def put(self, item_id: str, slot: int, item: NewItem, attributes: Attributes) -> bool:
        """Whether there is room for it: MAX_FRESH."""
        place = self.place.get(item_id)
        if place is None:
            if self.count < MAX_FRESH:
                place = self.count
                if place == len(self._arrays["slots"]):
                    self._grow(min(2 * place, MAX_FRESH))
                self.count += 1
            elif self._free:
                place = self._free.pop()
            else:
                return False
            self.place[item_id] = place
        arrays = self._arrays
        arrays["vectors"][place], arrays["biases"][place], arrays["slots"][place] = item.vector, item.bias, slot
        arrays["nearest"][place], arrays["alive"][place] = item.nearest, True
        if attributes is not Attributes.none():
            for name, value in attributes._asdict().items():
                arrays[name][place] = value
        return True

    def take_out(self, item_id: str) -> None:
        place = self.place.pop(item_id, None)
        if place is not None:
            self._arrays["alive"][place] = False
            self._free.append(place)


class LiveCatalogue:
    """What changed, as the stages need it.

    Args:
        store: whose log is followed.
        tables: folder with the tables of new items (``new_items``) of the version that is served.
        item_ids: raw ids to ids; below FIRST_ID for items that are not in the trained tables.
        ranks: whether attributes of fresh items are needed too.
    """

    def __init__(
        self, store: ServingStore, tables: Path, item_ids: ItemIds, shapes: StageTensors, ranks: bool = False
    ) -> None:
        self._store, self._folder, self._item_ids, self.shapes = store, tables, item_ids, shapes
        self._ranks = ranks
        self._key = NewItems.key_of(tables)
        self._tables: NewItems | None = None
        self._compiled = CompiledRows.load(tables)
        self.number, self.error = 0, ""
        self.rows: dict[str, dict[str, Any] | None] = {}  # of every item that changed; None: not to be answered
        self.ids: dict[str, int] = {}  # of the same
        self._names: dict[int, bytes] = {}  # of items out of the tables, by id; kept, as an answer may be on its way
        self.gone = np.zeros(0, np.int64)  # ids of the trained tables that must not be answered
        self._gone: set[int] = set()
        self.fresh: FreshItems | None = None  # None: there never was one
        self.left_out = 0  # fresh items beyond MAX_FRESH
        self.refresh()

    @property
    def tables(self) -> NewItems:
        """Read when the first new item comes."""
        if self._tables is None:
            self._tables = NewItems.load(self._folder)
        return self._tables

    def refresh(self) -> None:
        """Reads what changed. Where the store cannot be read, what was known stays, and ``error`` says so."""
        try:
            changes = self._store.catalogue_changes(self.number)
            if changes:
                self._apply(changes)
            self.error = ""
        except StoreError as error:  # in its own words, which it has logged
            self.error = str(error)
        except Exception as error:  # such as a store that is being exchanged: the next look may see it
            if not self.error:
                log.exception("live catalogue")
            self.error = f"{type(error).__name__}: {error}"

    def status(self) -> str:
        """Why the catalogue may be old, as a reason of STATUS; "" where it is not."""
        return f"changes of the catalogue cannot be read ({self.error})" if self.error else ""

    def _apply(self, changes: list[Change]) -> None:
        ids = self._item_ids([change.item_id for change in changes]).tolist()
        rows = [json.loads(change.row) if change.row else None for change in changes]
        rows = [None if row is None or sold_out(row) else row for row in rows]
        new = [i for i, row in enumerate(rows) if ids[i] < FIRST_ID and row is not None]
        items = dict(zip(new, self._new_items([changes[i] for i in new], [rows[i] for i in new]), strict=True))
        for i, (change, row) in enumerate(zip(changes, rows, strict=True)):
            known = ids[i] >= FIRST_ID
            if known and self._compiled.hold(change, ids[i]):  # the item is as it was: no change to anyone
                self._gone.discard(ids[i])
                self.rows.pop(change.item_id, None)
                self.ids.pop(change.item_id, None)
                continue
            self.rows[change.item_id] = row
            id_ = self.ids[change.item_id] = ids[i] if known else self.shapes.items + change.slot
            if not known:
                self._names[id_] = change.item_id.encode()
            if known:
                (self._gone.add if row is None else self._gone.discard)(ids[i])
            else:
                self._put(change, row, items.get(i))
        self.gone = np.array(sorted(self._gone), np.int64)
        self.number = changes[-1].number

    def _new_items(self, changes: list[Change], rows: list[Any]) -> list[NewItem | None]:
        """What stands for each: as stored, or made anew where it was stored by other tables."""
        old = [i for i, change in enumerate(changes) if change.made_by != self._key]
        made = dict(zip(old, self.tables([rows[i] for i in old]), strict=True)) if old else {}
        return [
            made[i] if i in made else NewItem.from_bytes(change.vector) if change.vector else None
            for i, change in enumerate(changes)
        ]

    def _put(self, change: Change, row: dict[str, Any] | None, item: NewItem | None) -> None:
        if row is None or item is None:
            if self.fresh is not None:
                self.fresh.take_out(change.item_id)
            return
        attributes = self.tables.attributes(row) if self._ranks else Attributes.none()
        if self.fresh is None:
            self.fresh = FreshItems(len(item.vector), attributes)
        if not self.fresh.put(change.item_id, change.slot, item, attributes):
            if not self.left_out:
                log.warning("live catalogue: %s: more than %d new items; 'vivace prepare', 'vivace train' and 'vivace "
                            "compile' take them in", change.item_id, MAX_FRESH)  # fmt: skip
            self.left_out += 1

    # -- for the stages -------------------------------------------------------------------------------
    def stands_for(self, item_id: str) -> tuple[int, int]:
        """(slot of a fresh item, id of the trained item that is read in its place); (0, 0) for any other."""
        place = None if self.fresh is None else self.fresh.place.get(item_id)
        if place is None or self.fresh is None:
            return 0, 0
        return int(self.fresh.of("slots")[place]), int(self.fresh.of("nearest")[place])

    def newest(self, histories: Sequence[Sequence[str]], newest_B: np.ndarray) -> np.ndarray:
        """``newest_B``, ids int64 [B] of the newest events of histories, with V and the slot for fresh items."""
        if self.fresh is None:
            return newest_B
        slots_B = np.array([self.stands_for(history[-1])[0] if history else 0 for history in histories], np.int64)
        return np.where(slots_B > 0, self.shapes.items + slots_B, newest_B)

    def name(self, id_: int) -> bytes:
        """Raw id of a fresh item's id; b"" where it is not known."""
        return self._names.get(id_, b"")
