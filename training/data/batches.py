"""Batches from NVTabular's parquet, read through ``rows``.

The loader hands lists over as values and offsets; here they become windows padded on the left.
Axis legend: B rows, T history events, V item ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.data.columns import ITEMS_ALONE, TIMED, EventColumns
from training.data.rows import batches_of_rows
from training.distributed import ALONE, World
from training.models.retrieval import RetrievalModel
from vivace.contract import ITEM, NULL_ID, PADDING_ID, TARGET, USER, StageTensors, label_column
from vivace.masks import excluded, seen_ids
from vivace.windows import Window, newest

TENSORS = (
    "history_BT", "time_BT", "target_B", "number_B", "user_B", "type_BT", "context_BC", "amount_BF", "rising_BM",
    "live_BMF",
)  # of Requests  # fmt: skip
POOL_BATCHES = 16  # batches that are cut, sorted by length and shuffled together


def pad_left(sequences: list[np.ndarray], length: int) -> Tensor:
    """The newest ``length`` ids of each sequence, int64 [B, length], padded on the left; of sequences [n, W] (ids and
    more, see ``EventColumns``) int64 [B, length, W], 0 where padded."""
    out = np.full((len(sequences), length, *sequences[0].shape[1:]), PADDING_ID, np.int64)
    for row, sequence in enumerate(sequences):
        last = sequence[-length:]
        out[row, length - len(last) :] = last
    return torch.from_numpy(out)


def windows(sequence: np.ndarray, length: int, offset: int = 0) -> list[np.ndarray]:
    """A sequence cut into pieces of ``length`` transitions from the newest back; every transition is in one piece.
    ``offset``: transitions of the first piece, if the sequence is longer than that (0: ``length``)."""
    pieces, end = [], len(sequence)
    if 0 < offset < end - 1:
        pieces.append(sequence[end - offset - 1 :])
        end -= offset
    while end > 1:
        pieces.append(sequence[max(0, end - length - 1) : end])
        end -= length
    return pieces


def kept_length(history: int, alpha: float) -> int:
    """Events that are left of a window of stochastic length, HSTU's N ** (alpha / 2)."""
    return max(2, round(history ** (alpha / 2)))


def shortened(window: np.ndarray, history: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Places int64 [n] of the events of a window [<= history + 1] that a step learns from (stochastic length, Zhai et
    al. 2024, eq. 4): all of them in a share N ** alpha / n ** 2 of the windows of more than N ** (alpha / 2) events, n
    of them, else so many: the newest half of those, and the other half drawn from the older ones."""
    n, length = len(window) - 1, kept_length(history, alpha)  # the last event is predicted alone
    places = np.arange(len(window))
    if n <= length or rng.random() < history**alpha / n**2:
        return places
    newest_events = (length + 1) // 2
    older = rng.choice(n - newest_events, length - newest_events, replace=False)
    return np.concatenate([np.sort(older), places[n - newest_events :]])


def _with_places(window: np.ndarray, places: np.ndarray) -> np.ndarray:
    """int64 [n, W + 1]: the events at ``places`` of a window [m] or [m, W], and these places."""
    events = window[places]
    return np.column_stack([events if events.ndim > 1 else events[:, None], places])


def _split(batch: dict[str, Tensor], column: str) -> list[np.ndarray]:
    values, offsets = batch[f"{column}__values"].numpy(), batch[f"{column}__offsets"].numpy()
    return np.split(values, offsets[1:-1])


def _events(batch: dict[str, Tensor], columns: EventColumns) -> list[np.ndarray]:
    """Each sequence as ``columns`` packs it, int64 [n, W]."""
    values = columns.packed({name: batch[f"{name}__values"].numpy().ravel() for name in columns.names})
    return np.split(values, batch[f"{ITEM}__offsets"].numpy()[1:-1])


def training_batches(
    files: list[Path],
    history: int,
    batch_size: int,
    seed: int,
    epoch: int,
    random_offset: bool = False,
    world: World = ALONE,
    shard_reading: bool = False,
    columns: EventColumns = ITEMS_ALONE,
    stochastic_length: float = 0.0,
) -> Iterator[Tensor]:
    """One epoch of windows, int64 [B, <= history + 1]; batches of like length, in an order set by seed and epoch.
    ``columns``: with more of each event than its item, [B, <= history + 1, W]. ``random_offset``: sequences longer than
    a window are cut at places that change from epoch to epoch. ``world``: of several processes each gets its rows of
    every batch or, with ``shard_reading``, batches of its own rows. ``stochastic_length``: the alpha of ``shortened``
    (0: windows are whole); then [B, <= history + 1, W + 1], last the place of an event in its window."""
    reader = world if shard_reading else ALONE
    batch_size = batch_size // reader.size
    rng = np.random.default_rng([seed, epoch])
    pool_seed = int(rng.integers(2**31))
    names = list(columns.names)
    for rows in batches_of_rows(files, names, batch_size * POOL_BATCHES, shuffle=True, seed=pool_seed, world=reader):
        offset = int(rng.integers(history // 2, history)) if random_offset and epoch else 0
        sequences = _split(rows, ITEM) if columns == ITEMS_ALONE else _events(rows, columns)
        pool = [w for s in sequences for w in windows(s, history, offset if len(s) > history + 1 else 0)]
        if stochastic_length:
            pool = [_with_places(w, shortened(w, history, stochastic_length, rng)) for w in pool]
        order = sorted(range(len(pool)), key=lambda i: len(pool[i]))
        starts = rng.permutation(np.arange(0, len(order), batch_size))
        for start in starts:
            chosen = [pool[i] for i in order[start : start + batch_size]]
            batch = pad_left(chosen, max(len(w) for w in chosen))
            if shard_reading:
                yield batch
            elif len(batch) >= world.size:  # else some process had no row to take a step with
                yield world.share(batch)


@dataclass(frozen=True)
class Requests:
    """Held-out requests: ``histories`` whole (for the seen filter), ``history_BT`` as the encoder reads them,
    ``time_BT`` ms of its events (0 where padded), ``target_B`` item ids, ``labels`` float [B] by head, ``number_B``
    int64: which request of the pass it is, from 0; ``user_B`` int64: the user's ``user_hash``, 0 where unknown. Of a
    log that has them, ``type_BT`` int64, types of the events, ``context_BC`` int64 and ``amount_BF`` float32. With live
    counters, ``rising_BM`` int64 and ``live_BMF`` float32: what was rising at the moment (``data.live``)."""

    histories: list[np.ndarray]
    history_BT: Tensor
    time_BT: Tensor
    target_B: Tensor
    labels: dict[str, Tensor]
    number_B: Tensor
    user_B: Tensor
    type_BT: Tensor | None = None
    context_BC: Tensor | None = None
    amount_BF: Tensor | None = None
    rising_BM: Tensor | None = None
    live_BMF: Tensor | None = None

    @property
    def context(self) -> tuple[Tensor | None, Tensor | None]:
        """The context that models read."""
        return self.context_BC, self.amount_BF

    def to(self, where: torch.device) -> Requests:
        """The same with its tensors on a device, but for those of ``labels``."""
        moved = {n: x.to(where) for n in TENSORS if (x := getattr(self, n)) is not None}
        return replace(self, **moved)

    @property
    def live(self) -> tuple[Tensor, ...]:
        """The last inputs of a ranker with live counters; none without."""
        return () if self.rising_BM is None or self.live_BMF is None else (self.rising_BM, self.live_BMF)

    def take(self, rows: np.ndarray) -> Requests:
        """The requests at ``rows`` int64, in their order."""
        index = torch.from_numpy(rows)
        labels = {head: values[index] for head, values in self.labels.items()}
        taken = {n: x[index] for n in TENSORS if (x := getattr(self, n)) is not None}
        return Requests([self.histories[i] for i in rows], labels=labels, **taken)

    def read_by(self, retriever: RetrievalModel) -> list[Tensor]:
        """The last inputs of a ranker over ``retriever``: types and context, as it reads them, then live counters."""
        context = retriever.read_context
        return [*self._moment(retriever.types, len(context.categoricals), len(context.continuous)), *self.live]

    def _excluding(self, exclude_seen: bool) -> list[np.ndarray]:
        return self.histories if exclude_seen else [h[:0] for h in self.histories]

    def exclude(self, items: int, exclude_seen: bool) -> Tensor:
        """bool [B, V], True where an item must not be answered."""
        return torch.from_numpy(excluded(self._excluding(exclude_seen), items))

    def inputs(self, s: StageTensors, exclude_seen: bool) -> list[np.ndarray]:
        """What the feature transform gives, in the contract's order: inputs of the retrieval stage and, with live
        counters, what they say of the rising items. What ``s`` does not read is left out."""
        histories = self._excluding(exclude_seen)
        seen = seen_ids(histories, s.seen) if s.lists_seen else excluded(histories, s.items)
        times = [self.time_BT.numpy()] if s.timed else []
        moment = (x.numpy() for x in self._moment(s.types, s.context, s.amounts))
        return [self.history_BT.numpy(), seen, *times, *moment, *(x.numpy() for x in self.live)]

    def _moment(self, types: int, categoricals: int, continuous: int) -> list[Tensor]:
        """See ``StageTensors.moment``: what is read of so many columns, null where these requests do not say."""
        rows, known = len(self.target_B), []
        if types:
            null_BT = torch.where(self.history_BT == PADDING_ID, PADDING_ID, NULL_ID)
            known.append(null_BT if self.type_BT is None else self.type_BT)
        if categoricals:
            null_BC = torch.full((rows, categoricals), NULL_ID)
            known.append(null_BC if self.context_BC is None else self.context_BC)
        if continuous:
            known.append(torch.zeros(rows, continuous) if self.amount_BF is None else self.amount_BF)
        return known


def together(parts: list[Requests]) -> Requests:
    """Several as one, in their order. Raises ValueError for none."""
    if not parts:
        raise ValueError("together: expected requests, got none")
    joined = {
        name: torch.cat([getattr(p, name) for p in parts]) for name in TENSORS if getattr(parts[0], name) is not None
    }
    labels = {head: torch.cat([p.labels[head] for p in parts]) for head in parts[0].labels}
    return Requests([history for p in parts for history in p.histories], labels=labels, **joined)


def cut(sequences: list[np.ndarray], window: Window) -> list[np.ndarray]:
    """The events of each sequence [n, W] that are read, as a server reads them."""
    if window.slide == 1:
        return sequences
    return [s[len(s) - newest(s[:, 0], window.length, window.slide) :] for s in sequences]


def of_sequences(
    sequences: list[np.ndarray],
    history: int | Window,
    target_B: Tensor,
    labels: dict[str, Tensor],
    first: int = 0,
    user_B: Tensor | None = None,
    columns: EventColumns = TIMED,
    context: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Requests:
    """Requests after ``sequences`` int64 [n, W] of ``columns``, numbered from ``first`` on."""
    window = history if isinstance(history, Window) else Window(history)
    events = columns.read(pad_left(cut(sequences, window), window.length))
    number_B = torch.arange(first, first + len(sequences))
    assert events.times is not None
    return Requests(
        [s[:, 0] for s in sequences], events.ids, events.times, target_B, labels, number_B,
        torch.zeros_like(number_B) if user_B is None else user_B, events.types, *context,
    )  # fmt: skip


def requests(
    files: list[Path],
    heads: list[str],
    history: int | Window,
    batch_size: int,
    shuffle_seed: int | None = None,
    back: int = 0,
) -> Iterator[Requests]:
    """Requests of "valid" or "test" files. ``back``: the files are training sequences, and the ``back``-th event from
    the end of each (1: the last) is the one to predict from those before it. No file, no request."""
    if not files:
        return
    all_columns = EventColumns.of_files(files)
    columns = replace(all_columns, context=(), amounts=())  # of the history; those of the moment come beside it
    names = [USER, *(all_columns if back else columns).names, *(label_column(h) for h in heads)]
    names += [] if back else [TARGET, *all_columns.targets]
    shuffle, passed = shuffle_seed is not None, 0
    for batch in batches_of_rows(files, names, batch_size, shuffle, shuffle_seed or 0):
        sequences, users = _events(batch, all_columns if back else columns), batch[USER].reshape(-1)
        if back:
            keep = [i for i, s in enumerate(sequences) if len(s) > back]
            lists = {h: _split(batch, label_column(h)) for h in heads}
            labels = {h: torch.tensor([float(of_head[i][-back]) for i in keep]) for h, of_head in lists.items()}
            target = torch.tensor([int(sequences[i][-back, 0]) for i in keep])
            if keep:
                context = all_columns.read(torch.from_numpy(np.stack([sequences[i][-back] for i in keep]))).context
            sequences, users = [sequences[i][:-back, : columns.width] for i in keep], users[keep]
        else:
            labels = {h: batch[label_column(h)].float().reshape(-1) for h in heads}
            target = batch[TARGET].reshape(-1)
            context = all_columns.of_targets(batch)
        if sequences:
            yield of_sequences(sequences, history, target, labels, passed, users, columns, context)
            passed += len(sequences)
