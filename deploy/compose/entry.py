"""What the server's container starts: ``vivace serve`` of the run that is mounted in /artifacts, as the user whose the
feature store is, so that nobody has to be told a user id and what is written stays that user's. With a store that
servers share, nothing there is written, and the folder of the store need not be there.

The arguments are those of ``vivace serve``. Standard library only.
"""

import os
import sys
from pathlib import Path

RUN = Path("/artifacts/run")
STORE, REPOSITORY = RUN / "feature_store", RUN / "model_repository"
LOG = "/var/log/vivace/triton.log"
SHARED = "VIVACE_STORE"  # the URL of a store that servers share, in the folder's place


def problem() -> str:
    """What is not mounted as it must be; "" where nothing is wrong."""
    if not (REPOSITORY / "recommend" / "config.pbtxt").exists():
        return "nothing to serve in artifacts/$VIVACE_NAME; run 'vivace compile' first, or set VIVACE_NAME"
    if os.environ.get(SHARED):
        return ""
    if not (STORE / "data.mdb").exists():
        return "no feature store in artifacts/$VIVACE_NAME; run 'vivace prepare' first"
    if not os.access(STORE / "data.mdb", os.R_OK | os.W_OK):
        return f"the feature store is not writable for user {os.getuid()}, whose folder it is in"
    return ""


def become_owner(path: Path) -> None:
    """Goes on as the owner of ``path``, where root started this."""
    if os.getuid() == 0 and path.exists() and (owner := path.stat()).st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    os.environ["HOME"] = "/tmp"


def main() -> int:
    become_owner(STORE if STORE.exists() else REPOSITORY)
    if text := problem():
        print(f"vivace: {text}", file=sys.stderr)
        return 1
    command = ["vivace", "serve", "--artifacts", str(RUN.parent), "--name", RUN.name, "--host", "0.0.0.0"]
    command.append("--insecure-network")  # Compose publishes its ports on 127.0.0.1 alone
    os.execvp(command[0], [*command, "--log-file", LOG, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
