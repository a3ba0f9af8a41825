"""Which callers a version on trial gets: by a salted hash of the user, the same in Envoy and here.

A user is assigned once and for all of a rollout, evenly, and independently of other rollouts, whose salts differ. The
door reads the user in the request (``checks.lua``); what it reads of the rollout is a filter of its own, in a file
that Envoy reads again when another takes its place.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from serving.door.extension import extension
from serving.door.options import DoorFiles
from serving.door.routes import TYPE
from vivace.manifest import write_text

SALT = re.compile(r"[A-Za-z0-9_-]{1,40}")
HEADER = "x-vivace-rollout"
HEADER_MUTATION = f"{TYPE}.http.header_mutation.v3.HeaderMutation"  # costs less than a line of Lua
_SPAN = 1 << 32


@dataclass(frozen=True)
class Split:
    """``share`` of the users, 0 to 1, goes to the version on trial. ``most``: the share of its last step; 0: this one.

    Those on trial lie below a hash, those whom they are compared with above another, and both parts grow by the same
    factor from step to step: nobody changes sides, and at any time there are as many of the one for each of the other.
    Who lies between gets the served version and counts on neither side."""

    salt: str
    share: float
    most: float = 0.0

    def __post_init__(self) -> None:
        if not SALT.fullmatch(self.salt):
            raise ValueError(f"salt: expected 1 to 40 letters, digits, _ or -, got {self.salt!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected 0 to 1, got {self.share:g}")
        if self.most and not self.share <= self.most <= 1:
            raise ValueError(f"most: expected at least the share, {self.share:g}, and at most 1, got {self.most:g}")

    @property
    def limit(self) -> int:
        """Hashes below it are on trial."""
        return round(self.share * _SPAN)

    def takes(self, who: str) -> bool:
        """Whether the user, or the session of someone anonymous, is answered by the version on trial."""
        return bool(who) and self._hash(who) < self.limit

    def compares(self, who: str) -> bool:
        """Whether the user is one of those whom the users on trial are compared with."""
        most = self.most or self.share
        others = round(self.share * (1 - most) / most * _SPAN) if most else _SPAN
        return bool(who) and self._hash(who) >= _SPAN - others

    def _hash(self, who: str) -> int:
        return int(hashlib.sha256(f"{self.salt}\0{who}".encode()).hexdigest()[:8], 16)


def write_split(files: DoorFiles, split: Split | None) -> None:
    """From now on callers are split so (None: nobody is on trial)."""
    header = {"key": HEADER, "value": f"{split.limit} {split.salt}"} if split else {}
    change: dict[str, Any] = {"append": {"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
    config = {"@type": HEADER_MUTATION, "mutations": {"request_mutations": [change if split else {"remove": HEADER}]}}
    write_text(files.rollout, extension("rollout", config))
