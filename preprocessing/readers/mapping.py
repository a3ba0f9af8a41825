"""The mapping of ``--data tables``: which columns of which files mean what. Its form is docs/preprocessing.md.

Everything is checked when the mapping is read; each error names the file, the section and the key.
"""

from __future__ import annotations

import codecs
import glob
import os
import re
import tomllib
from collections.abc import Mapping as Keys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocessing.readers.csv_rows import CsvFormat
from preprocessing.times import TIME_UNITS, zone_of
from vivace import contract
from vivace.contract import DataSchema, TaskHead

INTERACTIONS, ITEMS, USERS, SEARCHES = "interactions", "items", "users", "searches"
FORM = ("delimiter", "encoding", "quote", "decimal", "time_zone", "missing")
MOST = 1e15  # of a number, either way: beyond it float64 no longer knows hundredths
TEXT, TEXTS, BOOLEAN, NAMES = "a text", "a text or a list of texts", "true or false", "texts"
NUMBERS = f"numbers from {-MOST:g} to {MOST:g}"
GROUPS = "a list of lists of texts"
TEXT_EACH = "a text, or a text for each column of lists"
_FORM = {"delimiter": TEXT, "encoding": TEXT, "quote": TEXT, "decimal": TEXT, "time_zone": TEXT, "missing": TEXTS}
_KEYS: dict[str, dict[str, str]] = {
    "": {
        "name": TEXT, "unknown_items": TEXT, "exclude_seen": BOOLEAN, "sessions": BOOLEAN, "licence": TEXT,
        INTERACTIONS: "", ITEMS: "", USERS: "", SEARCHES: "", "heads": NUMBERS, "clock": BOOLEAN, "crosses": GROUPS,
        **_FORM,
    },
    INTERACTIONS: {
        "files": TEXTS, "user": TEXT, "item": TEXT, "time": TEXT, "time_unit": TEXT, "event_type": TEXT,
        "weight": TEXT, "weights": NUMBERS, "context": TEXTS, "context_continuous": TEXTS,
        "shown_types": TEXTS, "rename": NAMES, **_FORM,
    },
    ITEMS: {
        "files": TEXTS, "item": TEXT, "title": TEXTS, "categorical": TEXTS, "lists": TEXTS, "separator": TEXT_EACH,
        "continuous": TEXTS, "rename": NAMES, **_FORM,
    },
    USERS: {
        "files": TEXTS, "user": TEXT, "categorical": TEXTS, "continuous": TEXTS, "rename": NAMES, **_FORM,
    },
    SEARCHES: {
        "files": TEXTS, "search": TEXT, "user": TEXT, "time": TEXT, "time_unit": TEXT, "query": TEXT, "item": TEXT,
        "position": TEXT, "clicked": TEXT, **_FORM,
    },
}  # fmt: skip
NEEDED = {
    INTERACTIONS: ("files", "user", "item", "time"),
    ITEMS: ("files", "item"),
    USERS: ("files", "user"),
    SEARCHES: ("files", "search", "user", "time", "query", "item", "position", "clicked"),
}
_NAME = re.compile(r"\w([\w .\-]*\w)?")
_EVENT_NAMES = {contract.USER, contract.ITEM, contract.TIME, contract.EVENT, contract.WEIGHT, contract.SOURCE_ROW,
                contract.SPLIT, contract.TARGET, contract.TARGET_TIME, contract.HOUR, contract.WEEKDAY}  # fmt: skip
_ITEM_NAMES = {contract.ITEM, contract.TITLE, contract.TEXT, contract.SOURCE_ROW}
_ENDINGS = ("-list", "-target", "__values", "__offsets", "__encoded")


def texts(value: str | list[str] | None) -> list[str]:
    """One text or a list of them as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


@dataclass(frozen=True)
class Section:
    """One kind of table: its keys, how its files are written, and where they are."""

    mapping: Path
    name: str
    keys: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.mapping}: [{self.name}]"

    @property
    def decimal(self) -> str:
        return str(self.keys.get("decimal", "."))

    @property
    def zone(self) -> str | None:
        return self.keys.get("time_zone")

    @property
    def unit(self) -> str:
        return str(self.keys.get("time_unit", "s"))

    @property
    def missing(self) -> list[str]:
        """Words that mean that a value is missing, beside the empty one."""
        return texts(self.keys.get("missing"))

    def form(self, file: Path) -> CsvFormat:
        tabs = Path(file.name.removesuffix(".gz")).suffix in (".tsv", ".tab")
        return CsvFormat(
            self.keys.get("delimiter", "\t" if tabs else ","),
            self.keys.get("encoding", "utf-8"),
            self.keys.get("quote", '"'),
        )

    def columns(self, *keys: str) -> dict[str, str]:
        """Name in the schema: column in the file, of attributes listed under ``keys``."""
        rename = self.keys.get("rename", {})
        return {rename.get(column, column): column for key in keys for column in texts(self.keys.get(key))}

    def separators(self) -> dict[str, str]:
        """Name in the schema of each column under ``lists``: what parts its values where they are one text."""
        given = self.keys.get("separator", {})
        of_column = given if isinstance(given, dict) else dict.fromkeys(texts(self.keys.get("lists")), given)
        return {name: of_column.get(column, contract.SEPARATOR) for name, column in self.columns("lists").items()}

    def files(self) -> list[Path]:
        """Files in the order given, those of one pattern by name, each once; a folder stands for what is in it.

        Raises FileNotFoundError naming what matches nothing.
        """
        out: dict[Path, None] = {}
        for pattern in texts(self.keys["files"]):
            matched = _matches(self.mapping.parent, pattern)
            if not matched:
                raise FileNotFoundError(
                    f"{self.where} files: {pattern!r} matches no file (seen from {self.mapping.parent.resolve()})"
                )
            out.update(dict.fromkeys(matched))
        return list(out)


def _matches(folder: Path, pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    if (folder / pattern).exists():  # a name may look like a pattern
        matched = [folder / pattern]
    else:
        paths = glob.glob(os.path.join(glob.escape(os.fspath(folder)), pattern), recursive=True)
        matched = [Path(p) for p in sorted(paths)]
    parts = [sorted(p for p in m.rglob("*") if p.is_file()) if m.is_dir() else [m] for m in matched]
    hidden = ("_", ".")  # what Spark and others leave beside the parts, such as _SUCCESS
    return [p for m, inside in zip(matched, parts, strict=True) for p in inside
            if not (m.is_dir() and p.name.startswith(hidden))]  # fmt: skip


@dataclass(frozen=True)
class Mapping:
    """A mapping that was read and checked."""

    path: Path
    schema: DataSchema
    sections: dict[str, Section]


def read_mapping(path: Path) -> Mapping:
    """Raises FileNotFoundError or ValueError with the file, the section and the key."""
    if not path.exists():
        raise FileNotFoundError(
            f"mapping: no file {path}; check --path (a TOML file; 'vivace init-mapping' writes a first one)"
        )
    if path.is_dir():
        raise ValueError(f"mapping: {path} is a folder; --path names the TOML file in it")
    try:
        keys: dict[str, Any] = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, byte {error.start} is not; save the mapping as UTF-8") from None
    except (ValueError, RecursionError) as error:  # of TOML, of a number of thousands of digits, nested without end
        raise ValueError(f"{path}: not TOML: {error}") from None
    for section, kinds in _KEYS.items():
        if section == "" or section in keys:
            _check_keys(path, section, keys.get(section, {}) if section else keys, kinds)
    if INTERACTIONS not in keys:
        raise ValueError(f"{path}: expected a table [interactions], found none")
    shared = {key: keys[key] for key in FORM if key in keys}
    sections = {}
    ordered = keys.get("sessions", False)  # then the order of rows may stand for times
    for name, needed in NEEDED.items():
        if name not in keys:
            continue
        for key in needed:
            if key not in keys[name] and not (ordered and (name, key) == (INTERACTIONS, "time")):
                raise ValueError(f"{path}: [{name}] expected the key '{key}', found none")
        sections[name] = Section(path, name, {**shared, **keys[name]})
        _check_form(sections[name])
    return Mapping(path, _schema(path, keys, sections), sections)


def _check_keys(path: Path, section: str, keys: Any, kinds: dict[str, str]) -> None:
    shown = f"[{section}]" if section else "[top]"
    if not isinstance(keys, dict):
        raise ValueError(f"{path}: {section}: expected a table [{section}], got {keys!r}")
    unknown = sorted(set(keys) - set(kinds))
    if unknown:
        raise ValueError(f"{path}: {shown} unknown keys {unknown}; known: {sorted(kinds)}")
    for key, value in keys.items():
        if kinds[key] and not _is(value, kinds[key]):
            raise ValueError(f"{path}: {shown} {key}: expected {kinds[key]}, got {value!r}")


def _is(value: Any, kind: str) -> bool:
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= MOST  # noqa: E731
    if kind == BOOLEAN:
        return isinstance(value, bool)
    if kind == NUMBERS:
        return isinstance(value, dict) and all(number(v) for v in value.values())
    if kind == NAMES:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if kind == GROUPS:
        return isinstance(value, list) and all(isinstance(v, list) and _is(v, TEXTS) for v in value)
    if kind == TEXT_EACH:
        return isinstance(value, str) or _is(value, NAMES)
    listed = kind == TEXTS and isinstance(value, list) and all(isinstance(v, str) for v in value)
    return isinstance(value, str) or listed


def _check_form(section: Section) -> None:
    form, where = section.form(Path("")), section.where
    if len(form.delimiter) != 1:
        raise ValueError(f"{where} delimiter: expected one character, got {form.delimiter!r}")
    if len(form.quote) > 1 or form.quote == form.delimiter:
        raise ValueError(f'{where} quote: expected one character or "" for none, got {form.quote!r}')
    if section.decimal not in (".", ","):
        raise ValueError(f'{where} decimal: expected "." or ",", got {section.decimal!r}')
    try:
        codecs.lookup(form.encoding)
    except LookupError:
        raise ValueError(f"{where} encoding: expected one such as 'utf-8' or 'cp1252', got {form.encoding!r}") from None
    if section.zone is not None:
        try:
            zone_of(section.zone)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
    if section.unit not in TIME_UNITS:
        raise ValueError(f"{where} time_unit: expected one of {list(TIME_UNITS)}, got {section.unit!r}")
    if "weights" in section.keys and "event_type" not in section.keys:
        raise ValueError(f"{where} weights: they are by event type; name its column with event_type")
    if "shown_types" in section.keys and "event_type" not in section.keys:
        raise ValueError(f"{where} shown_types: they are event types; name their column with event_type")
    if "weights" in section.keys and "weight" in section.keys:
        raise ValueError(f"{where} weights: there is also weight = {section.keys['weight']!r}; keep one of the two")


def _check_names(section: Section, reserved: set[str], *keys: str) -> None:
    listed = [column for key in keys for column in texts(section.keys.get(key))]
    rename: Keys[str, str] = section.keys.get("rename", {})
    for column in rename:
        if column not in listed:
            raise ValueError(f"{section.where} rename: {column!r} is not among {' or '.join(keys)}")
    seen: set[str] = set()
    for column in listed:
        name = rename.get(column, column)
        taken = name in reserved or name.startswith("label_") or name.endswith(_ENDINGS)
        why = "that name is Vivace's own" if taken else "two columns have that name" if name in seen else ""
        if not _NAME.fullmatch(name):
            why = "a name is letters, digits, blanks, '.', '_' and '-'"
        if why:
            free = re.sub(r"[^\w.\-]+", "_", name).strip("_.- ") or "column"
            free = f"{free}_" if taken or name in seen else free
            raise ValueError(
                f"{section.where} column {column!r} cannot be called {name!r}: {why}; give it another name with "
                f'rename = {{ "{column}" = "{free}" }}'
            )
        seen.add(name)


def _check_lists(items: Section) -> None:
    lists, given = texts(items.keys.get("lists")), items.keys.get("separator")
    for kind in ("categorical", "continuous"):
        if both := sorted(set(lists) & set(texts(items.keys.get(kind)))):
            raise ValueError(f"{items.where} lists: {both[0]!r} is among {kind} too; keep it in one of the two")
    if given is not None and not lists:
        raise ValueError(
            f"{items.where} separator: expected columns under lists, found none; name them, or leave it out"
        )
    if isinstance(given, dict) and (strange := sorted(set(given) - set(lists))):
        raise ValueError(f"{items.where} separator: {strange[0]!r} is not among lists {lists}")
    if given is not None and "" in (given.values() if isinstance(given, dict) else [given]):
        raise ValueError(f'{items.where} separator: expected a text such as "|", got ""')


def _schema(path: Path, keys: dict[str, Any], sections: dict[str, Section]) -> DataSchema:
    events, items, users = sections[INTERACTIONS], sections.get(ITEMS), sections.get(USERS)
    _check_names(events, _EVENT_NAMES, "context", "context_continuous")
    context, amounts = events.columns("context"), events.columns("context_continuous")
    if users is not None:
        _check_names(users, _EVENT_NAMES | {*context, *amounts}, "categorical", "continuous")
    of_users = [users.columns(kind) if users else {} for kind in ("categorical", "continuous")]
    zone = (events.zone or "UTC") if keys.get("clock", False) else ""
    if items is not None:
        _check_lists(items)
        _check_names(items, _ITEM_NAMES, "categorical", "lists", "continuous")
    separators = items.separators() if items else {}
    heads = keys.get("heads") or {"click": float("-inf")}
    try:
        return DataSchema(
            name=keys.get("name", path.stem),
            event_categoricals=(contract.EVENT, *context, *of_users[0]),
            event_continuous=(contract.WEIGHT, *amounts, *of_users[1]),
            user_columns=(*of_users[0], *of_users[1]),
            time_zone=zone,
            item_categoricals=tuple(items.columns("categorical")) if items else (),
            item_continuous=tuple(items.columns("continuous")) if items else (),
            item_lists=tuple(separators),
            list_separators=tuple(separators.values()),
            heads=tuple(TaskHead(name, float(weight)) for name, weight in heads.items()),
            unknown_items=keys.get("unknown_items", "reject"),
            exclude_seen=keys.get("exclude_seen", not keys.get("sessions", False)),
            sessions=keys.get("sessions", False),
            crosses=tuple(tuple(cross) for cross in keys.get("crosses", ())),
            shown_types=tuple(texts(events.keys.get("shown_types"))),
            licence=keys.get("licence", ""),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
