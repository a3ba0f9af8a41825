"""Times of any spelling to Unix milliseconds, by one rule.

Times are int64 milliseconds since 1970, UTC; digits below a millisecond are cut. What cannot be read is NaN, what lies
before 1970 or after the year 9999 is infinite: both are float64 results, exact in that range.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytz

PER_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000)}  # unit: (factor, divisor)
TIME_UNITS = (*PER_MS, "iso")
END_MS = 253_402_300_800_000  # the year 10000
DAY_MS, HOUR_MS, MINUTE_MS = 86_400_000, 3_600_000, 60_000
# tz_localize works in nanoseconds of an int64; a day is left at either end for the offset
FIRST_NS_MS, LAST_NS_MS = pd.Timestamp.min.value // 10**6 + 2 * DAY_MS, pd.Timestamp.max.value // 10**6 - 2 * DAY_MS

_ISO = (
    r"^(?P<year>\d{4})(?:-(?P<month>\d{2})(?:-(?P<day>\d{2}))?|(?P<month2>\d{2})(?P<day2>\d{2}))?"
    r"(?P<time>[Tt ](?P<hour>\d{2})(?::?(?P<minute>\d{2})(?::?(?P<second>\d{2})(?:[.,](?P<fraction>\d+))?)?)?"
    r"(?P<zone>[Zz]|[+-]\d{2}(?::?\d{2})?)?)?$"
)
_DAYS_IN_MONTH = np.array([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])


def zone_of(name: str) -> pytz.BaseTzInfo:
    """The time zone ``name``: of the IANA database, or an offset such as "+02:00". Raises ValueError."""
    if len(name) == 6 and name[0] in "+-" and name[3] == ":" and (name[1:3] + name[4:]).isdigit():
        minutes = int(name[1:3]) * 60 + int(name[4:])
        return pytz.FixedOffset(minutes if name[0] == "+" else -minutes)
    try:
        return pytz.timezone(name)
    except pytz.UnknownTimeZoneError:
        raise ValueError(
            f"time_zone: expected a name such as 'Europe/Berlin' or an offset such as '+02:00', got {name!r}"
        ) from None


def in_range(ms: np.ndarray, known: np.ndarray) -> np.ndarray:
    """float64 ms; NaN where not ``known``, infinite outside 1970..9999."""
    out = np.where((ms >= 0) & (ms < END_MS), ms, np.inf).astype(float)
    out[~known] = np.nan
    return out


def localized(ms: np.ndarray, known: np.ndarray, zone: str | None) -> np.ndarray:
    """UTC of wall-clock times int64 ms in ``zone`` (None: UTC). An hour that the clock shows twice is the first of the
    two; one that it skips is the moment after the gap."""
    if zone is None or not known.any():
        return ms
    place, out = zone_of(zone), ms.copy()
    near = known & (ms > FIRST_NS_MS) & (ms < LAST_NS_MS)
    clock = pd.DatetimeIndex(ms[near].astype("datetime64[ms]").astype("datetime64[ns]"))
    utc = clock.tz_localize(place, ambiguous=np.ones(len(clock), bool), nonexistent="shift_forward")
    out[near] = utc.asi8 // 10**6
    far = np.flatnonzero(known & ~near & (ms >= 0) & (ms < END_MS))
    for i in far:  # such as 9999-12-31 for "never": few, one by one
        moment = ms[i].astype("datetime64[ms]").item()
        out[i] = ms[i] - int(place.utcoffset(moment).total_seconds() * 1000)
    return out


def _civil_days(year: np.ndarray, month: np.ndarray, day: np.ndarray) -> np.ndarray:
    """Days since 1970-01-01 of the Gregorian calendar (Hinnant, "chrono-compatible low-level date algorithms")."""
    year = year - (month <= 2)
    era = year // 400
    of_era = year - era * 400
    of_year = (153 * (month + np.where(month > 2, -3, 9)) + 2) // 5 + day - 1
    return era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468


def iso_ms(text: pa.Array, zone: str | None) -> np.ndarray:
    """ISO 8601 calendar dates, with or without a time of day and an offset, in extended or basic form ("2023",
    "2023-11", "2023-11-14T22:00:00.5+01:00", "20231114T220000Z"); a blank may stand for the T. Times without an
    offset are in ``zone``. Everything else is NaN."""
    parts = pc.extract_regex(pc.utf8_trim_whitespace(text), _ISO)
    known = parts.is_valid().to_numpy(zero_copy_only=False).copy()

    def field(name: str) -> pa.Array:
        return pc.fill_null(pc.struct_field(parts, name), "")

    def whole(name: str, default: int = 0) -> np.ndarray:
        value = field(name)
        return pc.cast(pc.if_else(pc.equal(value, ""), str(default), value), pa.int64()).to_numpy(zero_copy_only=False)

    year, month, day = whole("year"), whole("month", -1), whole("day", -1)
    month, day = np.where(month < 0, whole("month2", -1), month), np.where(day < 0, whole("day2", -1), day)
    timed = pc.not_equal(field("time"), "").to_numpy(zero_copy_only=False)
    known &= ~timed | (day >= 0)
    month, day = np.where(month < 0, 1, month), np.where(day < 0, 1, day)
    hour, minute, second = whole("hour"), whole("minute"), whole("second")
    fraction = pc.utf8_slice_codeunits(pc.utf8_rpad(field("fraction"), 3, "0"), 0, 3)
    ms = pc.cast(fraction, pa.int64()).to_numpy(zero_copy_only=False)
    leap = (month == 2) & ((year % 4 == 0) & (year % 100 != 0) | (year % 400 == 0))
    last = _DAYS_IN_MONTH[np.clip(month, 0, 12)] + leap
    known &= (month >= 1) & (month <= 12) & (day >= 1) & (day <= last)
    midnight = (hour == 24) & (minute == 0) & (second == 0) & (ms == 0)
    known &= ((hour <= 23) | midnight) & (minute <= 59) & (second <= 60)
    clock = _civil_days(year, month, day) * DAY_MS + hour * HOUR_MS + minute * MINUTE_MS + second * 1000 + ms
    offset, has_offset, fits = _offsets(field("zone"))
    utc = np.where(has_offset, clock - offset, localized(clock, known & ~has_offset, zone))
    return in_range(utc, known & fits)


def _offsets(zone: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offset int64 ms, whether there is one, whether it is below a day) of "Z", "+01", "+0130" or "+01:30"."""
    digits = pc.replace_substring_regex(zone, r"[Zz:+-]", "")
    digits = pc.cast(pc.utf8_rpad(digits, 4, "0"), pa.int64()).to_numpy(zero_copy_only=False)
    sign = np.where(pc.starts_with(zone, "-").to_numpy(zero_copy_only=False), -1, 1)
    offset = sign * ((digits // 100) * HOUR_MS + (digits % 100) * MINUTE_MS)
    return offset, pc.not_equal(zone, "").to_numpy(zero_copy_only=False), (digits < 2400) & (digits % 100 < 60)


def whole_ms(values: np.ndarray, unit: str, known: np.ndarray) -> np.ndarray:
    """Whole numbers int64 of ``unit`` as ms; exact, nothing overflows."""
    factor, divisor = PER_MS[unit]
    outside = (values < 0) | (values >= END_MS // factor * divisor)
    return in_range(np.where(outside, -1, values) * factor // divisor, known)


def fractional_ms(values: np.ndarray, unit: str) -> np.ndarray:
    """Floats of ``unit`` as ms. Rounded to a thousandth first: 1700000000.123 s is not a millisecond less."""
    factor, divisor = PER_MS[unit]
    with np.errstate(invalid="ignore", over="ignore"):
        ms = np.floor(np.round(values * factor / divisor, 3))
        return in_range(ms, np.isfinite(values))


def text_ms(text: pa.Array, unit: str, zone: str | None, number: Callable[[pa.Array], np.ndarray]) -> np.ndarray:
    """Times written as text; ``number`` reads float64 of text, NaN where there is none."""
    if unit == "iso":
        return iso_ms(text, zone)
    text = pc.utf8_trim_whitespace(text)
    digits = pc.fill_null(pc.match_substring_regex(text, r"^\d{1,18}$"), False)
    exact = pc.cast(pc.if_else(digits, text, "0"), pa.int64()).to_numpy(zero_copy_only=False)
    plain = digits.to_numpy(zero_copy_only=False)
    if plain.all():
        return whole_ms(exact, unit, plain)
    return np.where(plain, whole_ms(exact, unit, plain), fractional_ms(number(text), unit))


def check_unit(unit: str) -> None:
    if unit not in TIME_UNITS:
        raise ValueError(f"time unit: expected one of {[*TIME_UNITS]}, got {unit!r}")
