"""Which callers a version on trial gets: by a salted hash of the user, the same in Envoy and here.

A user is assigned once and for all of a rollout, evenly, and independently of other rollouts, whose salts differ. The
door reads the user in the request (``checks.lua``); what it reads of the rollout is a filter of its own, in a file
that Envoy reads again when another takes its place.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from serving.door.extension import extension
from serving.door.options import DoorFiles
from serving.door.routes import TYPE
from vivace.manifest import write_text

SALT = re.compile(r"[A-Za-z0-9_-]{1,40}")
HEADER = "x-vivace-rollout"
_SPAN = 1 << 32


@dataclass(frozen=True)
class Split:
    """``share`` of the users, 0 to 1, goes to the version on trial."""

    salt: str
    share: float

    def __post_init__(self) -> None:
        if not SALT.fullmatch(self.salt):
            raise ValueError(f"salt: expected 1 to 40 letters, digits, _ or -, got {self.salt!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected 0 to 1, got {self.share:g}")

    @property
    def limit(self) -> int:
        """Hashes below it are on trial."""
        return round(self.share * _SPAN)

    def takes(self, who: str) -> bool:
        """Whether the user, or the session of someone anonymous, is answered by the version on trial."""
        digest = hashlib.sha256(f"{self.salt}\0{who}".encode()).hexdigest()
        return bool(who) and int(digest[:8], 16) < self.limit


def write_split(files: DoorFiles, split: Split | None) -> None:
    """From now on callers are split so (None: nobody is on trial)."""
    call = f'replace("{HEADER}", "{split.limit} {split.salt}")' if split else f'remove("{HEADER}")'
    code = f"function envoy_on_request(handle) handle:headers():{call} end"
    config = {"@type": f"{TYPE}.http.lua.v3.Lua", "default_source_code": {"inline_string": code}}
    write_text(files.rollout, extension("rollout", config))
