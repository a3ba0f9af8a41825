"""Vivace: real-time search and recommendation inside a latency budget."""

from vivace.client import AsyncVivaceClient, Recommendation, VivaceClient, VivaceError

__all__ = ["AsyncVivaceClient", "Recommendation", "VivaceClient", "VivaceError"]
