"""Requests that no client of ours sends, by chance from a seed: each is malformed, careless or meant to do harm."""
