"""Business rules: what a shop wants of its answers whatever the models say, as ``rules.toml`` of a run's store has it.

    [[rule]]
    name = "no alcohol"
    do = "block"
    where = {category = ["wine", "beer"]}

What each ``do`` means: ``docs/rules.md``.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vivace.contract import DataSchema

FILE = "rules.toml"  # in the folder of a run's feature store, as ``retention.json``
ENVIRONMENT = "VIVACE_RULES"  # what a server tells its workers: where the rules are that it has accepted
MOST_RULES, MOST_CAPS, MOST_PLACES, MAX_NAME, MAX_BYTES = 200, 20, 100, 60, 4 << 20
BLOCK, BOOST, BURY, PIN, CAP, NEW = KINDS = ("block", "boost", "bury", "pin", "cap", "new")
RECOMMENDATIONS, SEARCHES, ALL = FOR = ("recommendations", "searches", "all")
_FIELDS = {  # of each kind, beside name, do and for: those it needs, those it may have
    BLOCK: ((), ("where", "items")),
    BOOST: (("places",), ("where", "items")),
    BURY: ((), ("where", "items")),
    PIN: (("items",), ("place",)),
    CAP: (("by", "most"), ("where",)),
    NEW: (("share",), ()),
}
EXAMPLE = '{brand = ["Alto"], price = {max = 20}}'


def rules_file(release: Path) -> Path:
    """Where the rules of a published version's run are, if it has any: a compressed variant has those of the whole."""
    return release.parent / "feature_store" / FILE


def read_rules(path: Path) -> str:
    """The text of a file, "" where there is none. Raises RulesError for one that cannot be read."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RulesError(f"cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RulesError(f"expected at most {MAX_BYTES >> 20} MiB, got {len(raw):,} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RulesError(f"expected UTF-8, got byte 0x{raw[error.start]:02x} at offset {error.start}") from None


class RulesError(ValueError):
    """A file of rules that says nothing that can be done; the message names the rule and its field."""


@dataclass(frozen=True)
class Where:
    """Which items: all of them hold. ``values``: an attribute is one of these, of a list any of it is; ``ranges``: a
    number lies between the two, both included; ``items``: raw ids (None: any)."""

    values: tuple[tuple[str, frozenset[str]], ...] = ()
    ranges: tuple[tuple[str, float, float], ...] = ()
    items: frozenset[str] | None = None

    def matches(self, item: str, row: Mapping[str, Any]) -> bool:
        """Of an item by its row (``preprocessing.item_rows``); what is missing is like nothing."""
        if self.items is not None and item not in self.items:
            return False
        for name, wanted in self.values:
            value = row.get(name)
            if not wanted & set(value if isinstance(value, list) else [value]):
                return False
        return all((number := row.get(name)) is not None and low <= number <= high for name, low, high in self.ranges)


@dataclass(frozen=True)
class Rule:
    """One rule. ``places``: of a boost; ``place``: of the first pinned item, from 1; ``by``, ``most``: of a cap;
    ``share``: of new items."""

    name: str
    do: str
    of: str
    where: Where = Where()
    places: int = 0
    place: int = 1
    pinned: tuple[str, ...] = ()
    by: str = ""
    most: int = 0
    share: float = 0.0

    @property
    def words(self) -> str:
        """What it does, for a table."""
        return {
            BOOST: f"boost by {self.places} places",
            PIN: f"pin {len(self.pinned)} from place {self.place}",
            CAP: f"cap: at most {self.most} of a {self.by}",
            NEW: f"new: {100 * self.share:.4g} % of the places",
        }.get(self.do, self.do)

    def applies(self, queried: bool) -> bool:
        return self.of == ALL or (self.of == SEARCHES) == queried


def deal_places(rules: Iterable[Rule]) -> bool:
    """Whether places are given out by rules, so that nothing else may be put in them."""
    return any(rule.do in (PIN, CAP, NEW) for rule in rules)


def parse_rules(text: str, schema: DataSchema) -> tuple[Rule, ...]:
    """The rules of a file. Raises RulesError."""
    try:
        record = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of TOML, of a number of thousands of digits, nested without end
        raise RulesError(f"expected TOML: {error}") from None
    if strange := sorted(set(record) - {"rule"}):
        raise RulesError(f"expected [[rule]] tables alone, got {strange[0]!r}")
    tables = record.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise RulesError("expected [[rule]], two brackets, got something else under 'rule'")
    if len(tables) > MOST_RULES:
        raise RulesError(f"expected at most {MOST_RULES} rules, got {len(tables)}")
    rules = tuple(_rule(number, table, schema) for number, table in enumerate(tables, 1))
    if (caps := sum(rule.do == CAP for rule in rules)) > MOST_CAPS:
        raise RulesError(f"expected at most {MOST_CAPS} rules with do = 'cap', got {caps}")
    names = [rule.name for rule in rules]
    if doubled := next((name for name in names if names.count(name) > 1), ""):
        raise RulesError(f"rule {doubled!r}: expected a name of its own, got it twice")
    return rules


def _rule(number: int, table: dict[str, Any], schema: DataSchema) -> Rule:
    name = table.get("name", "")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable() or ";" in name:
        raise RulesError(
            f"rule {number}: name: expected a text of at most {MAX_NAME} characters without ; got {name!r}"
        )
    try:
        return _checked(name, table, schema)
    except RulesError as error:
        raise RulesError(f"rule {name!r}: {error}") from None


def _checked(name: str, table: dict[str, Any], schema: DataSchema) -> Rule:
    do = _one_of(table, "do", KINDS)
    needed, allowed = _FIELDS[do]
    if missing := [field for field in needed if field not in table]:
        raise RulesError(f"{missing[0]}: expected with do = {do!r}, got none")
    if strange := sorted(set(table) - {"name", "do", "for", *needed, *allowed}):
        raise RulesError(f"{strange[0]}: expected {', '.join((*needed, *allowed)) or 'nothing more'} with do = {do!r}")
    of = _one_of(table, "for", FOR) if "for" in table else RECOMMENDATIONS if do in (PIN, NEW) else ALL
    items = _texts(table["items"], "items") if "items" in table else None
    if do == PIN and items is not None and len(items) > MOST_PLACES:
        raise RulesError(f"items: expected at most {MOST_PLACES} to pin, got {len(items)}")
    where = _where(table.get("where", {}), schema, None if do == PIN or items is None else frozenset(items))
    if do in (BLOCK, BOOST, BURY) and where == Where():
        raise RulesError(f"where or items: expected one with do = {do!r}, as it would hold for every item")
    by = table.get("by", "")
    if do == CAP and by not in (*schema.item_categoricals, *schema.item_lists):
        raise RulesError(f"by: expected one of {_listed(schema.item_categoricals, schema.item_lists)}, got {by!r}")
    share = table.get("share", 0.0)
    if do == NEW and not (_is_number(share) and 0 < share <= 1):
        raise RulesError(f"share: expected a number over 0 and up to 1, got {share!r}")
    return Rule(
        name, do, of, where,
        places=_count(table, "places", do == BOOST), place=_count(table, "place", "place" in table) or 1,
        pinned=tuple(items or ()) if do == PIN else (), by=by, most=_count(table, "most", do == CAP),
        share=float(share),
    )  # fmt: skip


def _where(record: Any, schema: DataSchema, items: frozenset[str] | None) -> Where:
    if not isinstance(record, dict):
        raise RulesError(f"where: expected a table such as {EXAMPLE}, got {record!r:.60}")
    values: list[tuple[str, frozenset[str]]] = []
    ranges: list[tuple[str, float, float]] = []
    for column, wanted in record.items():
        if column in (*schema.item_categoricals, *schema.item_lists):
            values.append((column, frozenset(_texts(wanted, f"where.{column}"))))
        elif column in schema.item_continuous:
            ranges.append((column, *_range(wanted, f"where.{column}")))
        else:
            known = _listed(schema.item_categoricals, schema.item_lists, schema.item_continuous)
            raise RulesError(f"where: expected attributes of the items, {known}, got {column!r}")
    return Where(tuple(values), tuple(ranges), items)


def _range(wanted: Any, name: str) -> tuple[float, float]:
    if not isinstance(wanted, dict) or not wanted or set(wanted) - {"min", "max"}:
        raise RulesError(f"{name}: expected {{min = …, max = …}}, one or both, got {wanted!r:.60}")
    for bound, value in wanted.items():
        if not _is_number(value):
            raise RulesError(f"{name}.{bound}: expected a number, got {value!r:.60}")
    low, high = (float(np.float32(wanted.get(bound, end))) for bound, end in (("min", -math.inf), ("max", math.inf)))
    if low > high:
        raise RulesError(f"{name}: expected min up to max, got {low:g} and {high:g}")
    return low, high


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise RulesError(f'{name}: expected a list of texts such as ["a", "b"], got {value!r:.60}')
    return list(dict.fromkeys(v.strip() for v in value))


def _one_of(table: Mapping[str, Any], field: str, choices: Collection[str]) -> str:
    value = table.get(field)
    if value not in choices:
        raise RulesError(f"{field}: expected one of {', '.join(choices)}, got {value!r}")
    return str(value)


def _count(table: Mapping[str, Any], field: str, wanted: bool) -> int:
    if not wanted:
        return 0
    value = table[field]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_PLACES:
        raise RulesError(f"{field}: expected a whole number of 1 to {MOST_PLACES}, got {value!r}")
    return value


def _is_number(value: Any) -> bool:
    """Of those that float32 holds, as the catalogue's numbers are."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 3e38


def _listed(*names: Collection[str]) -> str:
    return ", ".join(name for group in names for name in group) or "none, as the items have no such"
