"""Fits a retriever's session memory: its table from the log, its few numbers on requests whose targets are not in it.

Axis legend: B requests, V item ids, T history events, S sessions.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from preprocessing.features import Features
from training.data import batches
from training.data.counters import incidence
from training.models.retrieval import RetrievalModel
from training.models.session_memory import LONGEST, linear_weights, neighbour_shares
from vivace.contract import FIRST_ID, ITEM

REQUESTS, BATCH = 4096, 256  # that the numbers are fitted on, and of a step
PASSES, STEPS, RATE = 8, 128, 0.1  # as many passes at least, and more where they are fewer steps than that


def session_sets(files: list[Path], items: int, longest: int = LONGEST) -> sp.csr_matrix:
    """1 where a training sequence has an item among its ``longest`` newest events, float32 [S, V]."""
    rows, columns, first = [], [], 0
    for file in files:
        column = pq.read_table(file, columns=[ITEM])[ITEM].combine_chunks()
        flat, lengths = column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())
        row = np.repeat(np.arange(len(lengths)), lengths)
        from_end = np.cumsum(lengths)[row] - np.arange(len(row))
        newest = from_end <= longest
        rows.append(row[newest] + first)
        columns.append(flat[newest])
        first += len(lengths)
    none = np.empty(0, np.int64)
    return incidence(np.concatenate([*rows, none]), np.concatenate([*columns, none]), (first, items))


def remember(model: RetrievalModel, files: list[Path]) -> None:
    """Fills the memory's table from sequences; does nothing for a model without one."""
    if model.memory is None:
        return
    config, items = model.config, len(model.bias)
    if config.neighbours_by == "linear":
        whole = session_sets(files, items, sys.maxsize)
        model.memory.remember(*linear_weights(whole, config.neighbours, config.neighbours_ridge))
    else:
        model.memory.remember(*neighbour_shares(session_sets(files, items), config.neighbours))


def fit_memory(model: RetrievalModel, features: Features, seed: int, held_out: float) -> dict[str, float]:
    """Fits the memory's numbers by the log loss of validation requests, those of a share of the users ``held_out`` left
    out (who they are: see ``ranker.held_out_users``), and says that loss of the first and of the last pass. {} where
    there is no memory or no such request: the numbers stay those of another log."""
    from training.learn.ranker import held_out_users

    files, heads = features.files("valid"), [h.name for h in features.schema.heads]
    if model.memory is None or not files:
        return {}
    where, table = model.bias.device, model.table().detach()
    read = batches.requests(files, heads, model.config.history, BATCH, shuffle_seed=seed)
    requests = list(itertools.islice(read, REQUESTS // BATCH))
    numbers = [p.requires_grad_() for p in model.memory.parameters()]
    passes = max(PASSES, math.ceil(STEPS / max(len(requests), 1)))
    optimizer = torch.optim.Adam(numbers, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes * len(requests))
    losses: list[float] = []
    for _ in range(passes):
        total, count = 0.0, 0
        for request in requests:
            exclude_BV = request.exclude(len(model.bias), features.schema.exclude_seen)
            target_B = request.target_B
            known_B = (target_B >= FIRST_ID) & ~exclude_BV.gather(1, target_B[:, None])[:, 0]
            known_B &= torch.from_numpy(~held_out_users(request, held_out, seed))
            if not known_B.any():
                continue
            on, known_B = request.to(where), known_B.to(where)
            with torch.no_grad():
                encoded = model.encode(on.history_BT, table, on.time_BT, 1, on.type_BT)
            scores_BV = model.scores(on.history_BT, encoded, exclude_BV.to(where), table, on.context)
            loss = F.cross_entropy(scores_BV[known_B], target_B.to(where)[known_B])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total, count = total + float(loss.detach()) * int(known_B.sum()), count + int(known_B.sum())
        losses.append(total / max(count, 1))
    model.zero_grad(set_to_none=True)
    model.memory.requires_grad_(False)
    return {"first": losses[0], "last": losses[-1]}
