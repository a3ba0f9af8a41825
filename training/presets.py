"""Configurations by name. A preset is a function; nothing else decides sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from training.models.ranking import RankerConfig
from training.models.retrieval import EncoderConfig

LOSSES = ("full", "sampled", "gbce")
PRESET = "preset.json"  # of a trained run: the sizes that later steps take up


@dataclass(frozen=True)
class RetrievalTraining:
    """How the retriever learns.

    ``loss``: "full" softmax over all items; "sampled" softmax with ``negatives`` shared by a batch and the logQ
    correction, drawn by popularity ** ``negative_power``; "gbce" with ``negatives`` uniform ones and
    ``calibration``. ``label_smoothing`` is for the full softmax. ``ema``: decay of the average of the weights.
    ``random_offset``: windows are cut at another place each epoch. ``mask_share``: items hidden in a window, for the
    bert4rec family. ``start``: item embeddings from the training data's co-occurrence and item biases from its
    popularity ("cooccurrence"), or from chance ("random"). ``shard_reading``: under torchrun each
    process reads its own rows instead of its share of every batch. ``shard_model``: under torchrun each process keeps a
    part of the model and of the optimizer's state (FSDP). ``new_items``: items of the vocabulary without a training
    event get the mean of the "neighbours" that the catalogue's text and attributes give them, or stay what those say
    ("described"). ``adversarial``: how far, in mean lengths of an item embedding, FGM moves the embeddings for a second
    loss of ``adversarial_weight`` (0: none).

    ``probe_users``: users whose last training event is held back to watch NDCG@10 for early stopping (``patience``
    epochs without a gain; 0 never stops early). The validation event is not touched.
    """

    epochs: int = 16
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    loss: str = "full"
    negatives: int = 2048
    negative_power: float = 0.75
    calibration: float = 0.75
    label_smoothing: float = 0.0
    ema: float = 0.999
    random_offset: bool = True
    start: str = "cooccurrence"
    shard_reading: bool = False
    shard_model: bool = False
    new_items: str = "neighbours"
    adversarial: float = 0.0
    adversarial_weight: float = 1.0
    mask_share: float = 0.3
    clip_norm: float = 1.0
    patience: int = 3
    probe_users: int = 512
    checkpoint_s: float = 30.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"RetrievalTraining.loss: expected one of {LOSSES}, got {self.loss!r}")
        if self.label_smoothing and self.loss != "full":
            raise ValueError(f"RetrievalTraining.label_smoothing is for loss 'full', got {self.loss!r}")
        for name in ("label_smoothing", "ema", "mask_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"RetrievalTraining.{name}: expected 0 <= x < 1, got {getattr(self, name)}")
        if self.new_items not in ("neighbours", "described"):
            raise ValueError(
                f"RetrievalTraining.new_items: expected 'neighbours' or 'described', got {self.new_items!r}"
            )
        if self.start not in ("cooccurrence", "random"):
            raise ValueError(f"RetrievalTraining.start: expected 'cooccurrence' or 'random', got {self.start!r}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"RetrievalTraining: expected epochs and batch_size >= 1, got {self}")


@dataclass(frozen=True)
class RankerTraining:
    """How the ranker learns, on the validation events of all users but ``held_out`` of them (early stopping and
    calibration use those). ``weighting`` of the task losses: "static", "uncertainty" or "gradnorm". ``past_events``:
    the last training events of each user that are predicted as well, before the validation events in each epoch. The
    retriever and the counters have seen those, so on a sparse log they teach the ranker to trust them too much."""

    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    held_out: float = 0.1
    patience: int = 2
    weighting: str = "static"
    past_events: int = 0


@dataclass(frozen=True)
class Preset:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    retrieval: RetrievalTraining = field(default_factory=RetrievalTraining)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    ranking: RankerTraining = field(default_factory=RankerTraining)


def cpu() -> Preset:
    """Minutes on two cores; what the ML-1M figures of the README use."""
    return Preset()


def shop() -> Preset:
    """``cpu`` for short histories: the synthetic shop's users have 25 events."""
    base = cpu()
    return replace(
        base,
        encoder=replace(base.encoder, history=50),
        retrieval=replace(base.retrieval, epochs=6, batch_size=128, ema=0.99),
        ranking=replace(base.ranking, epochs=2, batch_size=128),
    )


def beauty() -> Preset:
    """For sparse logs of short histories with text, such as Amazon's."""
    return Preset(
        encoder=EncoderConfig(history=50, dropout=0.5, ffn_factor=1, text_tokens=24),
        retrieval=RetrievalTraining(epochs=4, batch_size=256, learning_rate=3e-3, ema=0.99, label_smoothing=0.1),
        ranking=RankerTraining(epochs=3, batch_size=128),
    )


def news() -> Preset:
    """Many users of short histories and tens of thousands of items: Globo's clicks."""
    return Preset(
        encoder=EncoderConfig(history=30),
        retrieval=RetrievalTraining(
            epochs=3, batch_size=512, learning_rate=2e-3, ema=0.99, loss="sampled", negatives=1024, random_offset=False
        ),
        ranking=RankerTraining(epochs=1, batch_size=256),
    )


def news_time() -> Preset:
    """``news`` with HSTU and the time between events: the better one where the log's times are real, most of all
    where requests name the user (a HISTORY in the request has no times)."""
    own = news()
    return replace(own, encoder=replace(own.encoder, family="hstu", time_bias=True))


def base() -> Preset:
    """One GPU, an hour: about 1 million parameters and the items. Written for a GPU, not run on one yet."""
    own = cpu()
    return replace(
        own,
        encoder=replace(own.encoder, width=128, layers=3, heads=4, dropout=0.3, position_bias="relative"),
        retrieval=replace(own.retrieval, epochs=60, batch_size=128, learning_rate=2e-3, patience=8),
        ranker=replace(own.ranker, candidates=200, experts=4, expert_width=128),
    )


def large() -> Preset:
    """One GPU of 80 GiB and more: 25 million parameters and the items. Written for a GPU, not run on one yet."""
    own = base()
    return replace(
        own,
        encoder=replace(own.encoder, width=512, layers=8, heads=8, dropout=0.4),
        retrieval=replace(own.retrieval, epochs=40, learning_rate=5e-4, weight_decay=0.01, warmup_steps=1000),
        ranker=replace(own.ranker, expert_width=256),
    )


def huge() -> Preset:
    """Several nodes of eight GPUs: 300 million parameters and the items, sharded. On paper: sizes by
    ``python -m benchmarks.estimate``, never trained."""
    own = large()
    return replace(
        own,
        encoder=replace(own.encoder, width=1024, layers=24, heads=16, history=512, time_bias=True),
        retrieval=replace(
            own.retrieval, epochs=2, batch_size=2048, learning_rate=3e-4, loss="sampled", negatives=16384, ema=0.0,
            start="random", shard_reading=True, shard_model=True,
        ),
    )  # fmt: skip


def tiny() -> Preset:
    """Seconds: for tests of the path, not of the quality."""
    return Preset(
        EncoderConfig(width=16, layers=1, heads=2, history=20, dropout=0.1),
        RetrievalTraining(epochs=2, batch_size=32, warmup_steps=5, probe_users=32, ema=0.9),
        RankerConfig(candidates=100, heads=2, experts=2, expert_width=16, lags=4, followers=8),
        RankerTraining(epochs=1, batch_size=32),
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    "cpu": cpu,
    "base": base,
    "large": large,
    "huge": huge,
    "beauty": beauty,
    "news": news,
    "news-time": news_time,
    "shop": shop,
    "tiny": tiny,
}


def from_json(record: dict[str, Any]) -> Preset:
    """The preset whose ``dataclasses.asdict`` is ``record``."""
    return Preset(
        EncoderConfig(**record["encoder"]),
        RetrievalTraining(**record["retrieval"]),
        RankerConfig(**record["ranker"]),
        RankerTraining(**record["ranking"]),
    )


def with_values(preset: Preset, values: dict[str, Any]) -> Preset:
    """``preset`` with values by dotted name, such as "encoder.dropout". Raises ValueError for a name it lacks."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, key = name.partition(".")
        known = part in {f.name for f in fields(preset)} and key in {f.name for f in fields(getattr(preset, part))}
        if not known:
            raise ValueError(f"{name}: no such field of a preset; expected for example 'encoder.dropout'")
        parts.setdefault(part, {})[key] = value
    for part, changed in parts.items():  # all of a part at once: its sizes must fit each other, not those before
        preset = replace(preset, **{part: replace(getattr(preset, part), **changed)})
    return preset


def preset(name: str) -> Preset:
    """A preset by name, or by the path of a JSON file: {"preset": "cpu", "encoder.width": 128, ...}. Raises ValueError
    for an unknown name, of the preset or of a field."""
    if name.endswith(".json"):
        values = json.loads(Path(name).read_text())
        return with_values(preset(values.pop("preset", "cpu")), values)
    if name not in PRESETS:
        raise ValueError(f"--preset: expected one of {sorted(PRESETS)} or a JSON file, got {name!r}")
    return PRESETS[name]()
