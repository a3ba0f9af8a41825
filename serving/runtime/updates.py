"""The call that changes the store: items put in and taken out, users forgotten. Rows of one batch are one transaction.

Nothing is acknowledged before it is on disk; a row that is at fault gets its error in STATUS, the others theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from preprocessing.item_rows import ItemRow, parse_item_json, sold_out, to_json
from serving.releases import releases
from serving.runtime.live_catalogue import ItemIds
from serving.runtime.new_items import TABLES, CompiledRows, NewItems
from serving.runtime.stages import ItemVocabulary, with_reason
from vivace.contract import (
    ACTION,
    FEATURE_TRANSFORM,
    FIRST_ID,
    FORGET,
    ITEM,
    MAX_FRESH,
    MAX_ID_BYTES,
    RECORD,
    REMOVE,
    STATUS_ERROR,
    STATUS_OK,
    UPDATE_STORE,
    UPSERT,
    DataSchema,
)
from vivace.store.interface import Change, ServingStore, StoreError

log = logging.getLogger(__name__)
NO_CATALOGUE = "this run has no live catalogue, as its items have neither text nor attributes"
NOT_FOLLOWED = "stored, but the profile that is served does not read changes; serve the default one, or fused"
NOTHING_SHARED = (
    "stored and found by its words, but not recommended: it shares no word and no attribute with a known item"
)
TOO_MANY = (
    f"stored, but not recommended: there are {MAX_FRESH:,} new items already; run 'vivace prepare', 'vivace train' and "
    "'vivace compile', which take them in"
)
SCHEMA = "schema.json"
NOTHING_KNOWN = "nothing was known of this user"


def with_shown(text: str, requests: int) -> str:
    """What became of a user who was forgotten, with the requests that left the log of impressions."""
    return f"{text}; {requests} requests left the log of impressions" if requests else text


def _id(raw: bytes, what: str) -> str:
    if not raw:
        raise ValueError(f"{RECORD.name}: expected {what} id, got an empty string")
    if len(raw) > MAX_ID_BYTES:
        raise ValueError(f"{RECORD.name}: expected an id of at most {MAX_ID_BYTES} bytes, got {len(raw)}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{RECORD.name}: expected UTF-8, got byte 0x{raw[error.start]:02x}") from None


class Updates:
    """``folder``: of the served version, with the tables of new items and the schema where it has a live catalogue.
    ``followed``: whether the profile that is served reads what changed. ``impressions``: folder of what was shown."""

    def __init__(
        self, store: ServingStore, folder: Path, item_ids: ItemIds, followed: bool = True,
        impressions: Path | None = None,
    ) -> None:  # fmt: skip
        self._store, self._folder, self._item_ids, self._followed = store, folder, item_ids, followed
        self._impressions = impressions
        self._schema = DataSchema.load(folder / SCHEMA) if (folder / SCHEMA).exists() else None
        self._new = NewItems.load(folder) if self._schema is not None else None
        self._key = NewItems.key_of(folder) if self._schema is not None else ""
        self._fresh: set[str] = set()  # items that are not in the trained tables and are recommended
        if self._new is not None:
            try:
                self._look_back()
            except StoreError as error:  # rows are taken once it answers; what is held goes at the next start
                log.warning("changes of before are not known: %s", error)

    def _look_back(self) -> None:
        """At what changed before this process started."""
        self.drop_held()
        changes = [c for c in self._store.catalogue_changes(0) if c.row and c.vector]
        ids = self._item_ids([c.item_id for c in changes])
        self._fresh = {c.item_id for c, id_ in zip(changes, ids.tolist(), strict=True) if id_ < FIRST_ID}

    def drop_held(self) -> int:
        """Takes changes out that the catalogues of all versions on disk hold, as one may be served again; how many."""
        changes = self._store.catalogue_changes(0)
        for folder, item_ids in [(self._folder, self._item_ids), *self._other_versions()] if changes else ():
            ids, compiled = item_ids([change.item_id for change in changes]).tolist(), CompiledRows.load(folder)
            changes = [change for change, id_ in zip(changes, ids, strict=True) if compiled.hold(change, id_)]
        return self._store.drop_changes([change.number for change in changes]) if changes else 0

    def _other_versions(self) -> Iterator[tuple[Path, ItemIds]]:
        """This folder in the other versions, with their vocabularies."""
        release = self._folder.parents[1]
        repository, _, number = release.name.rpartition(".")
        for other in releases(release.with_name(repository)) if number.isdecimal() else ():
            for tables in other.glob(f"{UPDATE_STORE}/*/{TABLES}") if other != release else ():
                graph = other / FEATURE_TRANSFORM / tables.parent.name / "transform.onnx"
                yield tables.parent, ItemVocabulary(graph, lazy=True)

    def __call__(self, actions: Sequence[bytes], records: Sequence[bytes]) -> list[str]:
        """STATUS of each row."""
        statuses = [STATUS_OK] * len(actions)
        changes: dict[int, Change] = {}
        rows: dict[int, ItemRow] = {}
        for i, (action, record) in enumerate(zip(actions, records, strict=True)):
            try:
                self._read(i, action, record, changes, rows, statuses)
            except ValueError as error:
                statuses[i] = f"{STATUS_ERROR}{error}"
        self._describe(changes, rows, statuses)
        for i in () if self._followed else changes:
            statuses[i] = with_reason(statuses[i], NOT_FOLLOWED)
        if changes:
            self._store.change_catalogue([changes[i] for i in sorted(changes)])
        return statuses

    def _read(
        self, i: int, action: bytes, record: bytes, changes: dict[int, Change], rows: dict[int, ItemRow],
        statuses: list[str],
    ) -> None:  # fmt: skip
        """One row; raises ValueError."""
        kind = action.decode("utf-8", "replace")
        if kind not in (UPSERT, REMOVE, FORGET):
            raise ValueError(f"{ACTION.name}: expected {UPSERT}, {REMOVE} or {FORGET}, got {kind[:60]!r}")
        if kind == FORGET:
            user = _id(record, "a user")
            shown = self._forget_shown(user)  # first: what fails then is asked for again
            known = self._store.forget(user)
            statuses[i] = with_shown(f"{STATUS_OK}: {self._store.FORGOTTEN if known else NOTHING_KNOWN}", shown)
            return
        if self._schema is None:
            raise ValueError(NO_CATALOGUE)
        if kind == REMOVE:
            changes[i] = Change(_id(record, "an item"))
            self._fresh.discard(changes[i].item_id)
            return
        notes: list[str] = []
        rows[i] = parse_item_json(record, self._schema, notes)
        statuses[i] = with_reason(STATUS_OK, "; ".join(notes))
        changes[i] = Change(rows[i][ITEM], to_json(rows[i]), self._key)

    def _forget_shown(self, user: str) -> int:
        """Takes a user out of the log of impressions; the requests of the user in it."""
        if self._impressions is None or not self._impressions.is_dir():
            return 0
        from vivace.impressions.files import forget  # pyarrow, which a run without a log does without

        return forget(self._impressions, user)

    def _describe(self, changes: dict[int, Change], rows: dict[int, ItemRow], statuses: list[str]) -> None:
        """Gives new items their vectors, and a reason to those that cannot be recommended."""
        if not rows or self._new is None:
            return
        ids = dict(zip(rows, self._item_ids([row[ITEM] for row in rows.values()]).tolist(), strict=True))
        new = [i for i in rows if ids[i] < FIRST_ID]
        for i, item in zip(new, self._new([rows[i] for i in new]), strict=True):
            change, item_id = changes[i], changes[i].item_id
            if item is not None:
                changes[i] = Change(item_id, change.row, change.made_by, item.to_bytes())
            if sold_out(rows[i]):
                self._fresh.discard(item_id)
            elif item is None:
                statuses[i] = with_reason(statuses[i], NOTHING_SHARED)
            elif item_id in self._fresh or len(self._fresh) < MAX_FRESH:
                self._fresh.add(item_id)
            else:
                statuses[i] = with_reason(statuses[i], TOO_MANY)
                log.warning("%s: %s", item_id, statuses[i])
