"""Vivace: real-time search and recommendation inside a latency budget."""

from vivace.client import Appended, AsyncVivaceClient, Recommendation, VivaceClient, VivaceError, VivaceTimeoutError

__all__ = ["Appended", "AsyncVivaceClient", "Recommendation", "VivaceClient", "VivaceError", "VivaceTimeoutError"]
