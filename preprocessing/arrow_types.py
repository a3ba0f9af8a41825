"""The one place where a column of any Arrow type becomes one of ours: text, numbers or times.

CSV comes here as text, Parquet by its own types; the same value gives the same result from either. ``where`` names the
file and the column in errors.
"""

from __future__ import annotations

import uuid
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing import times
from vivace.context import FALSE_WORDS, TRUE_WORDS

LARGEST = 1e30  # of a number: sums of larger ones overflow the float32 of a column
EXACT_FLOAT = 2**53  # from here on two whole numbers can be one float64
_NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
_NOT_FINITE = r"(?i)^[+-]?(inf|infinity|nan)$"


class Numbers(NamedTuple):
    """``values`` float64, NaN where missing; masks of what is there and is no number, and of what is not finite."""

    values: np.ndarray
    unreadable: np.ndarray
    not_finite: np.ndarray


def plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The values themselves: dictionaries decoded, run ends and extension types unwrapped."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of no chunk, or of more bytes than one array holds
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        if getattr(kind, "extension_name", "") == "arrow.uuid":
            return _uuids(array.storage)
        return plain(array.storage)
    if pa.types.is_dictionary(kind):
        return plain(array.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(array))
    return array


def is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _uuids(array: pa.Array) -> pa.Array:
    return pa.array([None if v is None else str(uuid.UUID(bytes=v)) for v in array.to_pylist()], pa.string())


def holds_uuids(column: pa.ChunkedArray) -> bool:
    """Whether binary values are UUIDs: each has 16 bytes, and they are not text."""
    array = plain(column)
    lengths = pc.unique(pc.drop_null(pc.binary_length(array.cast(pa.large_binary())))).to_pylist()
    return lengths == [16] and not _is_utf8(array)


def _is_utf8(array: pa.Array) -> bool:
    try:
        array.cast(pa.large_binary()).cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return True


def decoded(column: pa.ChunkedArray, uuids: bool) -> tuple[pa.Array, np.ndarray]:
    """(the values, with binary ones as text; where bytes are not UTF-8, bool). ``uuids``: binary values are UUIDs."""
    array = plain(column)
    if is_binary(array.type) and uuids:
        return _uuids(array), np.zeros(len(array), bool)
    if not (is_binary(array.type) or is_text(array.type)):
        return array, np.zeros(len(array), bool)
    if array.type == pa.string_view():
        array = array.cast(pa.large_string())
    if _is_utf8(array):
        return array.cast(pa.large_binary()).cast(pa.large_string()), np.zeros(len(array), bool)
    values, bad = [], np.zeros(len(array), bool)
    for i, value in enumerate(array.cast(pa.large_binary()).to_pylist()):
        try:
            values.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            bad[i] = True
            values.append(value.decode(errors="backslashreplace"))
    return pa.array(values, pa.large_string()), bad


def text(array: pa.Array, where: str) -> pa.Array:
    """Every value as text, null where missing. A number has one spelling whatever its type holds (1 and 1.0 are "1"),
    but a decimal keeps its digits; booleans are "true" and "false"; dates and times ISO 8601 with a blank.

    Raises ValueError for lists, structs and maps.
    """
    kind = array.type
    if is_text(kind):
        return array.cast(pa.large_string())
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.large_string())
    if pa.types.is_floating(kind):
        return _float_text(array)
    if pa.types.is_decimal(kind):
        return pa.array([None if v is None else f"{v:f}" for v in array.to_pylist()], pa.large_string())
    if pa.types.is_timestamp(kind):
        return _timestamp_text(array)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind):
        return array.cast(pa.string() if pa.types.is_temporal(kind) else pa.large_string()).cast(pa.large_string())
    raise ValueError(f"{where}: expected single values, got {kind}; {_advice(kind)}")


def _advice(kind: pa.DataType) -> str:
    if is_list(kind):
        return "an item's column of several values goes under lists, not categorical; others have one value a row"
    return "give its parts as columns of their own"


def ids(array: pa.Array, where: str) -> pa.Array:
    """``text``, but a decimal that is a whole number is spelled as such: 1.00 is the id 1."""
    if not pa.types.is_decimal(array.type) or array.type.scale <= 0:
        return text(array, where)
    spelled = [None if v is None else f"{v.to_integral_value() if v == v.to_integral_value() else v:f}"
               for v in array.to_pylist()]  # fmt: skip
    return pa.array(spelled, pa.large_string())


def _float_text(array: pa.Array) -> pa.Array:
    wide = array.cast(pa.float32() if array.type == pa.float16() else array.type)
    values = wide.to_numpy(zero_copy_only=False).astype(float)
    with np.errstate(invalid="ignore"):
        whole = np.isfinite(values) & (values == np.floor(values)) & (np.abs(values) < 2.0**63)
    digits = pa.array(np.where(whole, values, 0).astype("int64")).cast(pa.large_string())
    missing = np.isnan(values)
    spelled = pc.if_else(pa.array(whole), digits, wide.cast(pa.large_string()))
    return pc.if_else(pa.array(missing), pa.scalar(None, pa.large_string()), spelled)


def _timestamp_text(array: pa.Array) -> pa.Array:
    zoned = array.type.tz is not None
    plainly = array.cast(pa.timestamp(array.type.unit)).cast(pa.string())  # the zone off: UTC remains
    short = pc.replace_substring_regex(plainly, r"(\.\d*?)0+$", r"\1")
    short = pc.replace_substring_regex(short, r"\.$", "").cast(pa.large_string())
    return pc.binary_join_element_wise(short, "Z", "") if zoned else short


def is_blank(array: pa.Array) -> np.ndarray:
    """bool: null, or text of nothing but blanks."""
    if not is_text(array.type):
        return array.is_null().to_numpy(zero_copy_only=False)
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(array), ""), True).to_numpy(zero_copy_only=False)


def numbers(array: pa.Array, where: str, decimal: str = ".") -> Numbers:
    """float64 of numbers, booleans (1 and 0), or text with ``decimal`` as its mark. Currency, units and thousands
    marks are no numbers. What is larger than LARGEST counts as not finite.

    Raises ValueError for what can be no number, such as lists and times.
    """
    kind, none = array.type, np.zeros(len(array), bool)
    if pa.types.is_null(kind):
        return Numbers(np.full(len(array), np.nan), none, none)
    if is_text(kind):
        return _text_numbers(array, decimal)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = array.cast(pa.float32()) if kind == pa.float16() else array
        values = values.cast(pa.int8()) if pa.types.is_boolean(kind) else values
        values = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(float)
    elif pa.types.is_decimal(kind):
        values = np.array([np.nan if v is None else float(v) for v in array.to_pylist()], float)
    else:
        raise ValueError(f"{where}: expected numbers, got {kind}; {_advice(kind)}")
    there = array.is_valid().to_numpy(zero_copy_only=False)
    return _finite(values, none, there & ~np.isfinite(values))


def _finite(values: np.ndarray, unreadable: np.ndarray, not_finite: np.ndarray) -> Numbers:
    with np.errstate(invalid="ignore"):
        not_finite = not_finite | (np.abs(values) > LARGEST)
    return Numbers(np.where(not_finite, np.nan, values), unreadable, not_finite)


def _text_numbers(array: pa.Array, decimal: str) -> Numbers:
    trimmed = pc.utf8_trim_whitespace(array)
    pattern = _NUMBER.replace(r"\.", ",") if decimal == "," else _NUMBER
    good = pc.fill_null(pc.match_substring_regex(trimmed, pattern), False)
    digits = pc.replace_substring(trimmed, ",", ".") if decimal == "," else trimmed
    digits = pc.utf8_ltrim(pc.if_else(good, digits, "nan"), "+")
    with np.errstate(over="ignore"):
        values = pc.cast(digits, pa.float64()).to_numpy(zero_copy_only=False).copy()
    bits = {**dict.fromkeys(TRUE_WORDS, 1.0), **dict.fromkeys(FALSE_WORDS, 0.0)}
    words = pc.is_in(trimmed, value_set=pa.array(list(bits), trimmed.type)).to_numpy(zero_copy_only=False)
    if words.any():
        values[words] = [bits[w] for w in trimmed.filter(pa.array(words)).to_pylist()]
    readable = good.to_numpy(zero_copy_only=False) | words
    not_finite = pc.fill_null(pc.match_substring_regex(trimmed, _NOT_FINITE), False).to_numpy(zero_copy_only=False)
    return _finite(values, ~readable & ~is_blank(array) & ~not_finite, not_finite | (readable & ~np.isfinite(values)))


def times_ms(array: pa.Array, unit: str, zone: str | None, where: str, decimal: str = ".") -> np.ndarray:
    """Unix ms as float64, NaN where missing or unreadable, infinite before 1970 or after 9999 (see ``times``).

    Timestamps and dates are read by their own type, whatever ``unit`` says; those without a zone are in ``zone``.
    Raises ValueError for what can be no time.
    """
    times.check_unit(unit)
    kind, known = array.type, array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_null(kind):
        return np.full(len(array), np.nan)
    if pa.types.is_timestamp(kind):
        values = array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        factor, divisor = times.PER_MS[kind.unit]
        clock = np.clip(values, -(2**62) // factor, 2**62 // factor) * factor // divisor
        return times.in_range(times.localized(clock, known, None if kind.tz else zone), known)
    if pa.types.is_date(kind):
        days = array.cast(pa.date32()).cast(pa.int32()).fill_null(0).to_numpy(zero_copy_only=False).astype("int64")
        return times.in_range(times.localized(days * times.DAY_MS, known, zone), known)
    if is_text(kind) or unit == "iso":
        return times.text_ms(text(array, where), unit, zone, lambda t: numbers(t, where, decimal).values)
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return times.whole_ms(array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False), unit, known)
    if pa.types.is_decimal(kind) or kind == pa.uint64():
        return times.text_ms(text(array, where), unit, zone, lambda t: numbers(t, where).values)
    if pa.types.is_floating(kind):
        return times.fractional_ms(numbers(array, where).values, unit)
    raise ValueError(f"{where}: expected times, got {kind}; use a timestamp, a number with time_unit, or ISO 8601 text")


def parse_time_ms(raw: pd.Series, unit: str) -> pd.Series:
    """Unix time in ms as float64, NaN where it cannot be read, infinite before 1970 or after 9999. ``unit``: "s", "ms",
    "us", "ns" or "iso" (ISO 8601, UTC assumed)."""
    values = raw.astype(object).where(raw.notna(), None) if raw.dtype == object else raw
    array = plain(pa.array(values, from_pandas=True))
    return pd.Series(times_ms(array, unit, None, "time"), index=raw.index)


def to_series(array: pa.Array) -> pd.Series:
    """Text as pandas' object column with None where missing."""
    return pd.Series(array.to_numpy(zero_copy_only=False), dtype=object)
