"""Fills an empty store that servers share from the folder of the run that is mounted in /artifacts, once: a store that
is there is left as it is.

Runs before the first server; standard library and what the server's image has.
"""

import contextlib
import os
import sys

from entry import RUN, SHARED, STORE, become_owner

from vivace.store.remote.store import ValkeyStore


def main() -> int:
    if not (url := os.environ.get(SHARED)):
        print(f"vivace: {SHARED}: expected the URL of a store to fill", file=sys.stderr)
        return 1
    if not (STORE / "data.mdb").exists():
        print("vivace: no feature store in artifacts/$VIVACE_NAME; run 'vivace prepare' first", file=sys.stderr)
        return 1
    become_owner(STORE)
    with contextlib.closing(ValkeyStore(url)) as store:
        if store.filled():
            print("vivace: the store is filled already")
            return 0
    command = ["vivace", "store", "copy", "--artifacts", str(RUN.parent), "--name", RUN.name, "--to", url]
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
