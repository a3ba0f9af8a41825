"""A whole store from LMDB to a Valkey and back, with its numbers, ids and marks, compared at the end.

A copy begins anew where one was killed: what it had written is removed first, and nothing reads it before the end.
Appends have to rest meanwhile, as a Valkey has no view of one moment; the comparison would say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import msgpack

from vivace.store.interface import StoreError
from vivace.store.remote.address import Address
from vivace.store.remote.contents import Contents, End, contents
from vivace.store.remote.lmdb_end import LmdbEnd
from vivace.store.remote.valkey_end import ValkeyEnd


def copy(source: End, target: End, replace_target: bool, say: Callable[[str], None]) -> Contents:
    """Raises StoreError where the target has something and ``replace_target`` is not said, or where the two are not the
    same at the end."""
    if not replace_target and not target.is_empty():
        raise StoreError(f"{target.name}: there is a store already; --replace puts the copy in its place")
    target.write(source, say)
    say("comparing both")
    there, here = contents(source), contents(target)
    if there != here:
        differ = [k for k in there.kinds if there.kinds[k] != here.kinds[k]] or ["about"]
        raise StoreError(
            f"the copy differs in {', '.join(differ)}: expected {there.words()}, got {here.words()}; stop whatever "
            "appends to either, then copy again with --replace"
        )
    return here


def fill(source: LmdbEnd, target: ValkeyEnd) -> dict[str, int]:
    """Puts the data set of a run's own store in the place of the one in a Valkey, whose readers and appends go on and
    whose live events join it; numbers of users and titles. Users who are in the source by live events alone are left
    out."""
    rows = ((key, msgpack.unpackb(value)) for key, value in source.users())
    return target._store.fill(
        ((key, items, types, times) for key, (of_data_set, items, types, times) in rows if of_data_set),
        ((key, title.decode()) for key, title in source.titles()),
        ((key, msgpack.unpackb(value)) for key, value in source.attributes()),
    )


@contextlib.contextmanager
def end_of(place: str | Path) -> Iterator[End]:
    """A URL, or the folder of a store."""
    end: End = ValkeyEnd(Address.parse(place)) if isinstance(place, str) else LmdbEnd(place)
    try:
        yield end
    except lmdb.Error as error:
        raise StoreError(f"{end.name}: {error}") from None
    finally:
        end.close()
