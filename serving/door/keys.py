"""The keys of callers: a file that holds their SHA-256, one key a line, and never a key itself.

web = { sha256 = "9f86d0…", expires = 2027-02-25T00:00:00Z, rate = 100, write = true }
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
PREFIX = "vivace_"  # so that a key that leaked is known for one
MOST_RATE = 1_000_000
RATE = 100
FIELDS = ("sha256", "expires", "rate", "write")


class KeysError(ValueError):
    """A file of keys, or what is to be done to it, is not right; the message names file and key."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a server knows of a key."""

    name: str
    sha256: str
    """Of the key's bytes, 64 hex digits."""
    expires: datetime | None = None
    """From then on it is refused; None: never."""
    rate: int = RATE
    """Calls a second; as many at once."""
    write: bool = True
    """Whether it may call ``append_event`` and ``update_store``."""

    def line(self) -> str:
        """Of the file."""
        until = f"expires = {self.expires.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}, " if self.expires else ""
        more = f"rate = {self.rate}, write = {str(self.write).lower()}"
        return f'{self.name} = {{ sha256 = "{self.sha256}", {until}{more} }}'


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """256 bits of chance, so that a plain digest of it can be kept."""
    return PREFIX + secrets.token_urlsafe(32)


def _key(name: str, entry: Any) -> Key:
    """Raises KeysError that says what is wrong with the entry."""
    if not NAME.fullmatch(name):
        raise KeysError("expected a name of at most 64 letters, digits, _ and -")
    if not isinstance(entry, dict) or set(entry) - set(FIELDS) or "sha256" not in entry:
        raise KeysError(f"expected sha256 and, of {', '.join(FIELDS[1:])}, what differs; got {entry!r:.100}")
    sha256, expires, rate, write = (entry.get(f, d) for f, d in zip(FIELDS, ("", None, RATE, True), strict=True))
    if not isinstance(sha256, str) or not DIGEST.fullmatch(sha256.lower()):
        raise KeysError("sha256: expected 64 hex digits; 'vivace keys add' makes them")
    if isinstance(expires, date) and not isinstance(expires, datetime):
        expires = datetime.combine(expires, time())
    if expires is not None and not isinstance(expires, datetime):
        raise KeysError(f"expires: expected a date such as 2027-02-25, got {expires!r}")
    if expires is not None and expires.tzinfo is None:
        expires = expires.replace(tzinfo=UTC)
    if isinstance(rate, bool) or not isinstance(rate, int) or not 1 <= rate <= MOST_RATE:
        raise KeysError(f"rate: expected 1 to {MOST_RATE} calls a second, got {rate!r}")
    if not isinstance(write, bool):
        raise KeysError(f"write: expected true or false, got {write!r}")
    return Key(name=name, sha256=sha256.lower(), expires=expires, rate=rate, write=write)


def read_keys(path: Path) -> list[Key]:
    """Keys of a file. Raises KeysError for one that cannot be read or holds anything else."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeysError(f"{path}: cannot be read: {error.strerror}; 'vivace keys add NAME --file' makes one") from None
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number of thousands of digits
        raise KeysError(f"{path}: expected TOML, one key a line: {error}") from None
    keys: list[Key] = []
    for name, entry in entries.items():
        try:
            keys.append(_key(name, entry))
        except KeysError as error:
            raise KeysError(f"{path}: key {name}: {error}") from None
    names = {key.sha256: key.name for key in keys}
    for key in keys:
        if names[key.sha256] != key.name:
            raise KeysError(f"{path}: {key.name} and {names[key.sha256]} are one key; remove one of them")
    return keys


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Nobody else changes files of this folder meanwhile."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise KeysError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write_private(path: Path, text: str) -> None:
    """Puts ``text`` in the place of ``path`` at once and for good; its owner alone reads it."""
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def add_key(path: Path, name: str, days: int = 90, rate: int = RATE, write: bool = True) -> tuple[Key, str]:
    """Makes a key and adds its digest to the file; what is kept, and the key, which is nowhere else. Raises KeysError
    for a name that is taken or none."""
    key = new_key()
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    with _held(path):
        kept = _key(name, {"sha256": digest(key), "expires": expires, "rate": rate, "write": write})
        if path.exists() and any(other.name == name for other in read_keys(path)):
            raise KeysError(f"{path}: has a key {name}; remove it first, or take another name")
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        _replace(path, text + ("" if text.endswith("\n") or not text else "\n") + kept.line() + "\n")
    return kept, key


def remove_key(path: Path, name: str) -> None:
    """Takes a key out of the file. Raises KeysError where it has none of that name, or not on a line of its own."""
    with _held(path):
        if all(key.name != name for key in read_keys(path)):
            raise KeysError(f"{path}: has no key {name}; 'vivace keys list' shows those it has")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        left = [line for line in lines if not re.match(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=", line)]
        if len(left) != len(lines) - 1:
            raise KeysError(f"{path}: {name} is not on a line of its own; take it out by hand")
        _replace(path, "".join(left))


def _replace(path: Path, text: str) -> None:
    try:
        write_private(path, text)
    except OSError as error:
        raise KeysError(f"{path}: cannot be written: {error.strerror}") from None
