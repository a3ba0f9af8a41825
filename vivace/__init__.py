"""Vivace: real-time search and recommendation inside a latency budget."""

from vivace.client import Appended, AsyncVivaceClient, Recommendation, VivaceClient, VivaceError

__all__ = ["Appended", "AsyncVivaceClient", "Recommendation", "VivaceClient", "VivaceError"]
