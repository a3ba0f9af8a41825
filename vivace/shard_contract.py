"""The contract of one shard of retrieval, a server of its own: its model's name and tensors."""

from __future__ import annotations

from vivace.contract import FIRST_ID, StageTensors, WireTensor

SHARD_PREFIX = "retrieval_shard_"


def shard_model(shard: int) -> str:
    return f"{SHARD_PREFIX}{shard}"


def shard_inputs(s: StageTensors) -> tuple[WireTensor, ...]:
    """The user's state, and rows of the shard that may not be answered, 0 where there are fewer; row r, from 1, is item
    FIRST_ID + shard + shards * (r - 1)."""
    return (WireTensor("STATE", "FP32", (s.width,)), WireTensor("SEEN_ROWS", "INT64", (-1,)))


def shard_outputs(s: StageTensors, shard: int) -> tuple[WireTensor, ...]:
    """The best of the shard's items, which are dealt one by one, best first; PADDING_ID where there are fewer."""
    count = min(s.candidates, len(range(FIRST_ID + shard, s.items, s.shards)))
    return (WireTensor("CANDIDATE_IDS", "INT64", (count,)), WireTensor("CANDIDATE_SCORES", "FP32", (count,)))
