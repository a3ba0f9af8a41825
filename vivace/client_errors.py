"""What can go wrong in a call of the client, how long it may take, and when it is made again."""

from __future__ import annotations

import ssl
import time
from http.client import HTTPException

PLAIN_TO_TLS = "Trying to connect an http1.x server (HTTP status 400)"  # gRPC's words for the door's refusal
REVIVED = ("is not healthy", "has no available versions")  # Triton's words while a worker is brought back
RETRIES_S = (0.1, 0.4, 1.5)  # waits before an append is sent again, where nobody knows whether the server has it


class VivaceError(RuntimeError):
    """The server refused or failed; the message is the server's own. ``passing``: the same call may soon be answered,
    as the server could not be reached or had no time."""

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class VivaceTimeoutError(VivaceError):
    """No answer came while the client waited."""


def _failed(error: Exception) -> VivaceError:
    """What went wrong in a call, as an error of ours."""
    if isinstance(error, VivaceError):
        return error
    status = str(error.status()) if hasattr(error, "status") and callable(error.status) else ""
    text = error.message() if hasattr(error, "message") and callable(error.message) else str(error)
    passing = isinstance(error, OSError | HTTPException) or status in ("StatusCode.UNAVAILABLE", "502", "503", "504")
    passing = passing and not isinstance(error, ssl.SSLCertVerificationError)
    passing = passing or any(words in str(text) for words in REVIVED)
    if PLAIN_TO_TLS in str(text):
        return VivaceError("this port takes TLS only; give ca= or tls=True, or --tls-ca on the command line")
    return VivaceError(str(text) or type(error).__name__, passing and "not stored" not in str(text))


def _too_long(limit_s: float, within_ms: float) -> VivaceTimeoutError:
    if within_ms:
        return VivaceTimeoutError(f"within_ms: no answer came within {within_ms:g} ms; give it more or ask fewer")
    return VivaceTimeoutError(f"timeout_s: no answer came within {limit_s:g} s", passing=True)


class Limit:
    """How long a call may take: what is left of ``timeout_s`` or of ``within_ms``, whichever ends first."""

    def __init__(self, timeout_s: float, within_ms: float = 0.0) -> None:
        in_time = bool(within_ms) and within_ms / 1000 <= timeout_s
        self._limit_s, self._within_ms = (within_ms / 1000, within_ms) if in_time else (timeout_s, 0.0)
        self._until = time.monotonic() + self._limit_s

    def left(self) -> float:
        """Seconds. Raises VivaceTimeoutError where there are none."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise self.passed()
        return seconds

    def passed(self) -> VivaceTimeoutError:
        return _too_long(self._limit_s, self._within_ms)

    def error(self, error: Exception) -> VivaceError:
        """What went wrong in the call, as an error of ours."""
        status = str(error.status()) if hasattr(error, "status") and callable(error.status) else ""
        if isinstance(error, TimeoutError) or status == "StatusCode.DEADLINE_EXCEEDED":
            return self.passed()
        return _failed(error)

    def wait_s(self, error: VivaceError, tries: int) -> float:
        """Seconds to wait before a call that ended in ``error`` is made again. Raises ``error`` where it is not."""
        if not error.passing or tries >= len(RETRIES_S) or RETRIES_S[tries] >= self._until - time.monotonic():
            raise error
        return RETRIES_S[tries]
