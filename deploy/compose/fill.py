"""Fills an empty store that servers share from the folder of the run that is mounted in /artifacts, once: a store that
is there is left as it is.

Runs before the first server; standard library and what the server's image has.
"""

import contextlib
import os
import sys
from dataclasses import replace

from entry import RUN, SHARED, STORE, become_owner

from vivace.store.interface import StoreError
from vivace.store.remote.address import Address
from vivace.store.remote.store import ValkeyStore
from vivace.store.remote.valkey_end import SLOW_MS


def main() -> int:
    if not (url := os.environ.get(SHARED)):
        print(f"vivace: {SHARED}: expected the URL of a store to fill", file=sys.stderr)
        return 1
    if not (STORE / "data.mdb").exists():
        print("vivace: no feature store in artifacts/$VIVACE_NAME; run 'vivace prepare' first", file=sys.stderr)
        return 1
    become_owner(STORE)
    try:
        with contextlib.closing(ValkeyStore(replace(Address.parse(url), limit_ms=SLOW_MS))) as store:
            filled = store.filled()
    except (StoreError, ValueError) as error:
        print(f"vivace: {SHARED}: {error}", file=sys.stderr)
        return 1
    if filled:
        print("vivace: the store is filled already")
        return 0
    command = ["vivace", "store", "copy", "--artifacts", str(RUN.parent), "--name", RUN.name, "--to", url]
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
