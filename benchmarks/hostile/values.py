"""What malformed requests are made of: a good one, values that do not belong, and small mutations."""

from __future__ import annotations

import copy
import json
import random
import struct
from dataclasses import dataclass
from typing import Any

from vivace import contract
from vivace.explain_contract import EXPLAIN, EXPLANATION, LANGUAGE

STAGES = (*contract.STAGES, contract.QUERY_SEARCH)
PUBLIC = (contract.ENSEMBLE, EXPLAIN, contract.APPEND_EVENT, contract.UPDATE_STORE)
TEXTS = (
    "", "a", "\x00", "sku-03226", "no-such-item", "é漢\u202e", "'; DROP TABLE", "{}", "[[[", "%s%n", "..", "../../etc",
    "x" * 1025, "q" * 5000, "\ud800", "nan", "-0", "😀" * 300,
)  # fmt: skip
NUMBERS = (
    0,
    -1,
    1,
    2,
    101,
    2**31 - 1,
    2**31,
    -(2**31),
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    1.5,
    1e308,
    1e999,
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": {"b": []}}, [1, "a"], [[["a"]]])
DATATYPES = ("BYTES", "INT64", "INT32", "FP32", "FP16", "BF16", "BOOL", "UINT8", "INT128", "", "bytes", "STRING")
PARAMETERS = (
    "deadline_ms", "filters", "diversity", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end",
    "binary_data_output", "binary_data_size", "classification", "shared_memory_region", "shared_memory_offset",
    "shared_memory_byte_size", "triton_enable_empty_final_response", "headers", "deadline_ms_", "x", "", LANGUAGE,
)  # fmt: skip
OUTPUTS = ("STATUS", EXPLANATION.name, "ITEM_ID", "SCORE", "UNDERSTOOD", "HISTORY_LENGTH", "RANKED_IDS", "")


@dataclass(frozen=True)
class Column:
    """One input of a request: its name, datatype, shape and values."""

    name: str
    datatype: str
    shape: list[int]
    values: list[Any]


def good(rng: random.Random, rows: int = 1) -> tuple[str, list[Column]]:
    """A model and inputs that it takes. Users are few, so that the store does not grow for ever."""
    user = [f"fuzz-{rng.randrange(30)}" for _ in range(rows)]
    items = [f"sku-{rng.randrange(1, 5000):05}" for _ in range(4 * rows)]
    if rng.random() < 0.25:
        return contract.APPEND_EVENT, [
            Column("USER_ID", "BYTES", [rows, 1], user),
            Column("ITEM_ID", "BYTES", [rows, 1], items[:rows]),
            Column("EVENT_TYPE", "BYTES", [rows, 1], ["view"] * rows),
            Column("TIMESTAMP_MS", "INT64", [rows, 1], [0] * rows),
        ]
    return rng.choice((contract.ENSEMBLE, contract.ENSEMBLE, EXPLAIN)) if rows == 1 else contract.ENSEMBLE, [
        Column("USER_ID", "BYTES", [rows, 1], user),
        Column("QUERY", "BYTES", [rows, 1], [""] * rows),
        Column("HISTORY", "BYTES", [rows, 4], items),
        Column("TOP_K", "INT32", [rows, 1], [rng.randint(1, 20)] * rows),
    ]


def odd(rng: random.Random) -> Any:
    """A value of any kind."""
    return copy.deepcopy(rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS))))


def odd_shape(rng: random.Random) -> list[int]:
    whole = [int(n) for n in NUMBERS if abs(n) < 1e300]
    return [rng.choice((0, 1, 2, 65, rng.choice(whole))) for _ in range(rng.randrange(5))]


def as_json(columns: list[Column]) -> dict[str, Any]:
    """KServe's JSON of a request."""
    return {
        "inputs": [{"name": c.name, "datatype": c.datatype, "shape": c.shape, "data": c.values} for c in columns]
    }  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [at, *(path for key, item in items for path in places(item, (*at, key)))]
    return [at]


def changed(rng: random.Random, value: Any) -> Any:
    """A JSON value with a few of its parts replaced, removed, renamed or doubled."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice(places(value))
        if not path:
            value = odd(rng) if rng.random() < 0.1 else value
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how = rng.randrange(4)
        if how == 0:
            del parent[path[-1]]
        elif how == 1 and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(path[-1])
        elif how == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = odd(rng)
    return value


def packed(values: list[Any], datatype: str) -> bytes:
    """Values as Triton's raw bytes."""
    if datatype == "BYTES":
        texts = [str(v).encode("utf-8", "replace") for v in values]
        return b"".join(struct.pack("<I", len(t)) + t for t in texts)
    return b"".join(struct.pack("<q" if datatype == "INT64" else "<i", int(v)) for v in values)


def cut_strings(rng: random.Random, raw: bytes) -> bytes:
    """Raw BYTES whose lengths lie."""
    how = rng.randrange(5)
    if how == 0:
        return raw[: rng.randrange(len(raw) + 1)]
    if how == 1:
        return raw + rng.randbytes(rng.randrange(1, 9))
    if how == 2:
        return struct.pack("<I", rng.choice((2**32 - 1, 2**31, len(raw), len(raw) + 1, 0))) + raw[4:]
    if how == 3:
        return raw * rng.randrange(2, 5)
    return rng.randbytes(rng.randrange(40))


def flipped(rng: random.Random, raw: bytes) -> bytes:
    """Bytes with some of them changed, cut out or repeated."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif how == 1:
            out[at:at] = rng.randbytes(rng.randrange(1, 5))
        elif how == 2:
            del out[at : at + rng.randrange(1, 20)]
        else:
            out[at:at] = out[at : at + rng.randrange(1, 30)]
    return bytes(out)


def odd_parameter(rng: random.Random) -> tuple[str, Any]:
    name = rng.choice(PARAMETERS)
    tempting = ("abc", "", "nan", "inf", True, 5, "1e400", "[1", '{"values":', '{"ranges":{"price":[5,1]}}', "2", -1)
    return name, rng.choice(tempting) if rng.random() < 0.6 else odd(rng)


def dumped(rng: random.Random, value: Any) -> bytes:
    """JSON text of a value, sometimes with text in it that JSON does not have, or names that come twice."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = text.replace(b'"shape"', b'"shape":[1,1],"shape"', 1)
    return text if rng.random() < 0.8 else flipped(rng, text)
