"""Vivace: real-time search and recommendation inside a latency budget."""

from vivace.client import (
    Appended,
    AsyncVivaceClient,
    Event,
    Recommendation,
    VivaceClient,
    VivaceError,
    VivaceTimeoutError,
)

__all__ = [
    "Appended", "AsyncVivaceClient", "Event", "Recommendation", "VivaceClient", "VivaceError", "VivaceTimeoutError",
]  # fmt: skip
