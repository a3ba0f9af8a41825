"""One row of a catalogue as JSON: checked and typed as ``cleaning.clean_items`` does it for a table, without pandas, so
that a row that is sent to a server means what the same row means to ``vivace prepare``."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vivace.context import spelled
from vivace.contract import EVENT_PART, ITEM, MAX_ID_BYTES, MAX_ROW_BYTES, STOCK, TEXT, TITLE, DataSchema

# by the schema's names: ITEM, TITLE and TEXT str, categoricals str or None, lists list[str], numbers or None
ItemRow = dict[str, Any]
_WRITTEN_LIST = re.compile(r"\[.*\]|\{.*\}|\(\s*[\"'].*\)", re.DOTALL)  # printed, not parted by a separator


def _text(value: Any, name: str) -> str | None:
    """Text without blanks around it, None where nothing is left."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name}: expected a text, got {type(value).__name__} {str(value)[:60]!r}")
    return _checked(str(value).strip(), name) or None


def _category(value: Any, name: str) -> str | None:
    text = _text(value, name)
    return None if text is None else spelled(text)


def is_written_list(text: str) -> bool:
    """Whether a text is a list that was printed, such as "[1, 2]" or "{a,b}"."""
    return _WRITTEN_LIST.fullmatch(text.strip()) is not None


def list_values(value: Any, name: str, separator: str) -> list[str]:
    """Values of a list attribute: each once, without blanks around it, in alphabetical order; [] for none. ``value`` is
    a list, a text whose values ``separator`` parts, or None.

    Raises ValueError for anything else.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        if is_written_list(value):
            raise ValueError(
                f"{name}: expected values parted by {separator!r}, got {value[:60]!r}, a list written as text; part "
                "its values by the separator, or give a true list (Parquet, JSON)"
            )
        value = value.split(separator)
    elif not isinstance(value, list | tuple | np.ndarray):
        if not (value is None or isinstance(value, bool | int | float)):
            raise ValueError(
                f"{name}: expected a list of texts, or a text with values parted by {separator!r}, got "
                f"{type(value).__name__} {str(value)[:60]!r}"
            )
        value = [value]
    values = (_category(part, f"{name}, a value of the list") for part in value)
    return sorted({text for text in values if text is not None})


def _checked(text: str, name: str) -> str:
    """``text``; raises ValueError where UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got {text[error.start]!r}") from None
    return text


def _number(value: Any, name: str, notes: list[str]) -> float | None:
    """A number as float32 holds it; None for what is none, as a table's reader takes it, and a note of what came."""
    if isinstance(value, dict | list):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__} {str(value)[:60]!r}")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(np.float32(value))
    except (ValueError, TypeError, OverflowError):
        number = math.inf
    if math.isinf(number):
        notes.append(f"{name}: expected a number, got {value!r:.60}; taken as missing")
    return number if math.isfinite(number) else None


def parse_item(record: Mapping[str, Any], schema: DataSchema, notes: list[str] | None = None) -> ItemRow:
    """A row by the catalogue's own column names; what is absent is null. STOCK may be there also where the catalogue
    has no such column. ``notes``: takes what cannot be read and counts as missing, one text a column. Raises ValueError
    that names the column, what was expected and what came."""
    notes = [] if notes is None else notes
    known = (ITEM, TITLE, TEXT, *schema.item_attributes)
    if strange := sorted(set(record) - {*known, STOCK}):
        raise ValueError(f"item: expected columns of {', '.join(dict.fromkeys([*known, STOCK]))}, got {strange[0]!r}")
    item = _text(record.get(ITEM), ITEM)
    if item is None:
        raise ValueError(f"{ITEM}: expected an item id, got none; name the item in {ITEM!r}")
    if EVENT_PART in item:
        raise ValueError(f"{ITEM}: expected an id without U+001F, which parts an event of HISTORY, got {item!r:.60}")
    if len(item.encode()) > MAX_ID_BYTES:
        raise ValueError(f"{ITEM}: expected at most {MAX_ID_BYTES} bytes, got {len(item.encode())}; shorten it")
    texts = {name: record.get(name) for name in (TITLE, TEXT)}
    for name, text in texts.items():
        texts[name] = _checked(text, name) if isinstance(text, str) else _text(text, name)
    title = texts[TITLE] or ""
    row: ItemRow = {ITEM: item, TITLE: title, TEXT: title if TEXT not in record else texts[TEXT] or ""}
    row |= {name: _category(record.get(name), name) for name in schema.item_categoricals}
    row |= {name: list_values(record.get(name), name, part) for name, part in schema.separators.items()}
    numbers = [*schema.item_continuous, *([STOCK] if STOCK in record else [])]
    row |= {name: _number(record.get(name), name, notes) for name in dict.fromkeys(numbers)}
    return row


def parse_item_json(raw: bytes, schema: DataSchema, notes: list[str] | None = None) -> ItemRow:
    """``parse_item`` of a JSON object in UTF-8. Raises ValueError."""
    if len(raw) > MAX_ROW_BYTES:
        raise ValueError(f"item: expected a row of at most {MAX_ROW_BYTES} bytes, got {len(raw)}; shorten its text")
    try:
        record = json.loads(raw)
        if not isinstance(record, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise ValueError(f'item: expected a JSON object such as {{"{ITEM}": "a"}}, got {raw[:80]!r}') from None
    return parse_item(record, schema, notes)


def sold_out(row: Mapping[str, Any]) -> bool:
    """Whether a row says that nothing is left: a STOCK of 0 or less."""
    stock = row.get(STOCK)
    return stock is not None and stock <= 0


def to_json(row: Mapping[str, Any]) -> str:
    """One spelling for one row."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def digest(row_json: str) -> int:
    """64 bits of a row's JSON: equal rows have equal ones."""
    return int.from_bytes(hashlib.sha256(row_json.encode("utf-8", "surrogatepass")).digest()[:8], "big")
