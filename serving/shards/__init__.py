"""Retrieval in shards: who asks them, and the servers that they are."""
