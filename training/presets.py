"""Configurations by name. A preset is a function; nothing else decides sizes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from preprocessing.caps import LearningCaps
from preprocessing.features import Features
from training.models.ranking import RankerConfig
from training.models.retrieval import EncoderConfig
from training.models.task_heads import check_weighting
from training.preset_files import files_of
from training.preset_rules import check_read
from vivace import contract
from vivace.checks import Amount, Positive, Range, Share, Size, Whole, check_fields


@dataclass(frozen=True, kw_only=True)
class RetrievalTraining:
    """How the retriever learns."""

    epochs: Size = 16
    """Passes over the training windows at most."""
    batch_size: Size = 64
    """Windows a step, of all processes together."""
    learning_rate: Positive = 4e-3
    """Peak of the schedule."""
    weight_decay: Amount = 0.0
    """Of AdamW, on matrices of layers."""
    warmup_steps: Whole = 100
    """Steps until the peak, at most a tenth of all."""
    loss: Literal["full", "sampled", "gbce"] = "full"
    """"full": softmax over all items; "sampled": softmax over negatives drawn by popularity, with the logQ correction
    (Yi et al. 2019); "gbce": calibrated binary cross-entropy over uniform negatives (Petrov & Macdonald 2023)."""
    negatives: Size = 2048
    """Negatives shared by a batch, for "sampled" and "gbce"."""
    negative_power: Annotated[float, Range(0, 10)] = 0.75
    """"sampled" draws by popularity to this power."""
    calibration: Annotated[float, Range(0, 1)] = 0.75
    """t of "gbce", 0 (none) to 1."""
    label_smoothing: Share = 0.0
    """Share of the target's probability spread over all items, for "full"; 0 <= x < 1 (Szegedy et al. 2016)."""
    ema: Share = 0.999
    """Decay a step of the average of the weights, which is what is kept (0: the weights themselves)."""
    random_offset: bool = True
    """Long sequences are cut into windows at another place each epoch."""
    start: Literal["cooccurrence", "random"] = "cooccurrence"
    """Item embeddings start from the training data's co-occurrence and biases from its popularity, or at random."""
    stochastic_length: Annotated[float, Range(0, 2, below=True)] = 0.0
    """Windows of more than history ** (x / 2) events are cut to so many, at random and the more often the longer they
    are (HSTU's alpha, Zhai et al. 2024: 1 < x < 2; 0: never). A step of 1,000 events and 1.6 reads 251 of most."""
    shard_reading: bool = False
    """Under torchrun each process reads its own rows instead of its share of every batch."""
    shard_model: bool = False
    """Under torchrun each process keeps a part of the model and of the optimizer's state (FSDP)."""
    compiled: bool = False
    """The encoder's blocks run through torch.compile: some seconds more to start, fewer a step."""
    new_items: Literal["neighbours", "described", "tower", "graph"] = "neighbours"
    """Items without a training event get the mean of the seen items nearest by text and attributes, or stay what those
    say ("described"). "tower": a pretrained text tower has a part in who is near, and the bias is what the text lets
    expect. "graph": half that mean, half what is learned of their attributes and words (``data.item_relations``)."""
    tower: str = "minilm"
    """For "tower": its name, folder or Hugging Face name (``training.text.tower``)."""
    new_item_boost: Annotated[float, Range(-1000, 1000)] = 0.0
    """Added to the bias of items without a training event: above 0 they are shown more, at the cost of the others."""
    adversarial: Amount = 0.0
    """How far, in mean lengths of an item embedding, FGM moves the embeddings for a second loss (0: none)."""
    adversarial_weight: Amount = 1.0
    """Of that second loss."""
    day_events: Whole = 0
    """Of a user's events of a day, what is learned from, by the ranker's counters too (0: all)."""
    same_item_s: Whole = 0
    """Of a user's events on one item within so many seconds one is learned from, so too (0: each)."""
    mask_share: Share = 0.3
    """Items hidden in a window, for the bert4rec family; 0 <= x < 1."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient."""
    patience: Whole = 3
    """Epochs without a smaller loss of the probe users before training stops (0: never)."""
    probe_users: Whole = 512
    """Users whose last training event is held back for early stopping; the validation event is not touched."""
    checkpoint_s: Amount = 30.0
    """Seconds between checkpoints."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tower.strip():
            raise ValueError(f"RetrievalTraining.tower: expected a name or a folder, got {self.tower!r}")
        if self.label_smoothing and self.loss != "full":
            raise ValueError(f"RetrievalTraining.label_smoothing is for loss 'full', got {self.loss!r}")
        if self.stochastic_length and not 1 < self.stochastic_length < 2:
            raise ValueError(
                f"RetrievalTraining.stochastic_length: expected 0 or 1 < x < 2, got {self.stochastic_length}"
            )

    @property
    def caps(self) -> LearningCaps:
        """Of what is learned from one user."""
        return LearningCaps(self.day_events, self.same_item_s)


@dataclass(frozen=True, kw_only=True)
class RankerTraining:
    """How the ranker learns, on the validation events of all users but those held out."""

    epochs: Size = 4
    """Passes over the requests at most."""
    batch_size: Size = 64
    """Requests a step."""
    learning_rate: Positive = 2e-3
    """Peak of the schedule."""
    weight_decay: Amount = 0.01
    """Of AdamW, on matrices of layers."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient."""
    held_out: Share = 0.1
    """Share of the users kept for early stopping and calibration, 0 <= x < 1."""
    patience: Whole = 2
    """Epochs without a smaller loss of the held-out users before training stops (0: never)."""
    weighting: str = "static"
    """Of the task losses: "static", "uncertainty", "gradnorm", or "only-1" for head 1 alone (``TaskWeights``)."""
    past_events: Whole = 0
    """The last training events of each user that are predicted as well, before the validation events in each epoch. The
    retriever and the counters have seen those, so on a sparse log they teach the ranker to trust them too much."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_weighting(self.weighting)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """All that decides the size and the training of a run's two models."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Shape of the retriever's encoder."""
    retrieval: RetrievalTraining = field(default_factory=RetrievalTraining)
    """Training of the retriever."""
    ranker: RankerConfig = field(default_factory=RankerConfig)
    """Shape of the ranker."""
    ranking: RankerTraining = field(default_factory=RankerTraining)
    """Training of the ranker."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.retrieval.stochastic_length and self.encoder.family == "bert4rec":
            raise ValueError("Preset: retrieval.stochastic_length is for encoders that predict the next event")
        self._check_nearest()
        if (width := self.encoder.width) % (heads := self.ranker.heads):
            raise ValueError(f"Preset: expected ranker.heads that divide encoder.width {width}, got {heads}")
        if self.ranker.shown_rates and not self.ranker.rising:
            raise ValueError(
                "Preset: ranker.shown_rates are of live counters: expected ranker.rising above 0, got 0; set it, or "
                "leave ranker.shown_rates out"
            )
        if self.ranker.rising and self.ranking.past_events:
            raise ValueError(
                f"Preset: expected ranking.past_events 0 beside ranker.rising {self.ranker.rising}, got "
                f"{self.ranking.past_events}: the retriever has learned from all training events, so what it says of "
                "their moments is hindsight"
            )

    def _check_nearest(self) -> None:
        reads, memory = self.encoder.span, self.ranker.memory
        if memory > reads:
            raise ValueError(f"Preset: expected ranker.memory of at most the {reads} events read, got {memory}")
        if self.ranker.nearest and self.encoder.history <= (memory or reads):
            raise ValueError(
                "Preset: ranker.nearest chooses among events before those that are encoded: set encoder.reads, or "
                f"ranker.memory, below encoder.history {self.encoder.history}"
            )
        if reads < self.encoder.history and not self.ranker.nearest:
            raise ValueError(
                f"Preset: encoder.reads {reads} leaves the older of {self.encoder.history} events to ranker.nearest, "
                "which is 0; set that too, or encoder.history to what is read"
            )


LATER: dict[str, Any] = {  # fields of a preset's parts that came later, with what held before
    "positions": "slots", "slide": 1, "reads": 0, "stochastic_length": 0.0, "nearest": 0, "nearest_to": "candidate",
    "neighbours_by": "sessions", "neighbours_ridge": 300.0, "rising_same_item_s": 0, "rising_user_events": 0,
    "rising_newcomers": 0.0, "day_events": 0, "same_item_s": 0, "shown_rates": False,
}  # fmt: skip


def recorded_fields(part: EncoderConfig | RetrievalTraining | RankerConfig) -> dict[str, Any]:
    """The fields that say what was trained; those of LATER only where they differ, so that what was trained before
    there were such is still known by its key."""
    return {name: value for name, value in asdict(part).items() if name not in LATER or value != LATER[name]}


def cpu() -> Preset:
    """Minutes on two cores; what the ML-1M figures of the README use. Without the context of a request, which was not
    measured there yet."""
    return Preset(encoder=EncoderConfig(context=False))


def shop() -> Preset:
    """``cpu`` for short histories: the synthetic shop's users have 25 events."""
    preset = cpu()
    return replace(
        preset,
        encoder=replace(preset.encoder, history=50, context=True),
        retrieval=replace(preset.retrieval, epochs=6, batch_size=128, ema=0.99),
        ranking=replace(preset.ranking, epochs=2, batch_size=128),
    )


def beauty() -> Preset:
    """For sparse logs of short histories with text, such as Amazon's."""
    return Preset(
        encoder=EncoderConfig(history=50, dropout=0.5, ffn_factor=1, text_tokens=24),
        retrieval=RetrievalTraining(epochs=4, batch_size=256, learning_rate=3e-3, ema=0.99, label_smoothing=0.1),
        ranking=RankerTraining(epochs=3, batch_size=128),
    )


def news() -> Preset:
    """Many users of short histories and tens of thousands of items: Globo's clicks. Without the context of a request:
    there the hour alone, learned from the articles of other days, cost half of NDCG@10."""
    return Preset(
        encoder=EncoderConfig(history=30, context=False),
        retrieval=RetrievalTraining(
            epochs=3, batch_size=512, learning_rate=2e-3, ema=0.99, loss="sampled", negatives=1024, random_offset=False
        ),
        ranking=RankerTraining(epochs=1, batch_size=256),
    )


def news_time() -> Preset:
    """``news`` with HSTU and the time between events: the better one where the log's times are real, most of all
    where requests name the user (a HISTORY in the request has no times)."""
    preset = news()
    return replace(preset, encoder=replace(preset.encoder, family="hstu", time_bias=True))


def news_live() -> Preset:
    """``news`` whose ranker reads what is clicked most at the moment: for logs with real times where what counts is
    what is new. A user's clicks on one item count once in half an hour, so that few accounts push nothing
    (docs/attacks.md)."""
    preset = news()
    return replace(
        preset,
        ranker=replace(preset.ranker, candidates=50, rising=100, rising_same_item_s=1800, rising_newcomers=2.0),
        ranking=replace(preset.ranking, epochs=12, patience=3, learning_rate=3e-3, batch_size=128),
    )


def session() -> Preset:
    """Logs of sessions: short histories of nobody known, whose items may come again."""
    return Preset(
        encoder=EncoderConfig(history=50, dropout=0.5, ffn_factor=2, neighbours=64),
        retrieval=RetrievalTraining(
            epochs=2, batch_size=128, learning_rate=3e-3, ema=0.99, loss="sampled", negatives=2048,
            random_offset=False,
        ),
        ranker=RankerConfig(lags=20),
        ranking=RankerTraining(epochs=2, batch_size=128),
    )  # fmt: skip


def music() -> Preset:
    """``session`` for listeners: items with text and tags, that may come again, in a log of too few events for a
    softmax over a sample. Neighbours are those of whole histories, as taste is steady; the ranker counts how often the
    candidate is in the history."""
    preset = session()
    return replace(
        preset,
        encoder=replace(
            preset.encoder, history=200, neighbours=128, neighbours_by="linear", text_tokens=24, attributes=True
        ),
        retrieval=replace(preset.retrieval, epochs=6, loss="full", label_smoothing=0.1, random_offset=True),
        ranker=replace(preset.ranker, category_counts=True),
    )


def base() -> Preset:
    """One GPU: about 1 million parameters and the items."""
    preset = cpu()
    return replace(
        preset,
        encoder=replace(preset.encoder, width=128, layers=3, heads=4, dropout=0.3, position_bias="relative"),
        retrieval=replace(preset.retrieval, epochs=60, batch_size=128, learning_rate=2e-3, patience=8),
        ranker=replace(preset.ranker, candidates=200, experts=4, expert_width=128),
    )


def large() -> Preset:
    """One GPU of 80 GiB and more: 25 million parameters and the items; too many for a million events."""
    preset = base()
    return replace(
        preset,
        encoder=replace(preset.encoder, width=512, layers=8, heads=8, dropout=0.4),
        retrieval=replace(preset.retrieval, epochs=40, learning_rate=5e-4, weight_decay=0.01, warmup_steps=1000),
        ranker=replace(preset.ranker, expert_width=256),
    )


def huge() -> Preset:
    """Several nodes of eight GPUs: 300 million parameters and the items, sharded. On paper: sizes by
    ``python -m benchmarks.estimate``, never trained."""
    preset = large()
    return replace(
        preset,
        encoder=replace(preset.encoder, width=1024, layers=24, heads=16, history=512, time_bias=True),
        retrieval=replace(
            preset.retrieval, epochs=2, batch_size=2048, learning_rate=3e-4, loss="sampled", negatives=16384, ema=0.0,
            start="random", shard_reading=True, shard_model=True,
        ),
    )  # fmt: skip


def tiny() -> Preset:
    """Seconds: for tests of the path, not of the quality."""
    return Preset(
        encoder=EncoderConfig(width=16, layers=1, heads=2, history=20, dropout=0.1),
        retrieval=RetrievalTraining(epochs=2, batch_size=32, warmup_steps=5, probe_users=32, ema=0.9),
        ranker=RankerConfig(candidates=100, heads=2, experts=2, expert_width=16, lags=4, followers=8),
        ranking=RankerTraining(epochs=1, batch_size=32),
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    "cpu": cpu,
    "base": base,
    "large": large,
    "huge": huge,
    "beauty": beauty,
    "news": news,
    "news-time": news_time,
    "news-live": news_live,
    "session": session,
    "music": music,
    "shop": shop,
    "tiny": tiny,
}


def from_json(record: dict[str, Any]) -> Preset:
    """The preset whose ``dataclasses.asdict`` is ``record``."""
    return Preset(
        encoder=EncoderConfig(**record["encoder"]),
        retrieval=RetrievalTraining(**record["retrieval"]),
        ranker=RankerConfig(**record["ranker"]),
        ranking=RankerTraining(**record["ranking"]),
    )


def flat(preset: Preset) -> dict[str, Any]:
    """All values of a preset by dotted name, such as "encoder.dropout"."""
    return {f"{part}.{name}": value for part, values in asdict(preset).items() for name, value in values.items()}


def with_values(preset: Preset, values: dict[str, Any]) -> Preset:
    """``preset`` with values by dotted name, such as "encoder.dropout". Raises ValueError for a name it lacks, for a
    value that its field does not take, and for one that nothing reads (``preset_rules``)."""
    parts, names = dict[str, dict[str, Any]](), flat(preset)
    for name, value in values.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1) or ["encoder.dropout"]
            raise ValueError(f"{name}: no such field of a preset; expected for example {near[0]!r}")
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = value
    # all at once: sizes must fit each other, not those before
    changed = replace(preset, **{part: replace(getattr(preset, part), **of) for part, of in parts.items()})
    check_read(flat(changed), flat(Preset()), values)
    return changed


def preset(name: str) -> Preset:
    """A preset by name, or by the path of a JSON file: {"preset": "cpu", "encoder.width": 128, ...}. Raises ValueError
    for an unknown name, of the preset or of a field, and for values as in ``with_values``, with the file."""
    base, changes = files_of(name, PRESETS)
    chosen = PRESETS[base]()
    for file, values in changes:
        try:
            chosen = with_values(chosen, values)
        except ValueError as error:
            raise ValueError(f"--preset: {file}: {error}") from None
    return chosen


def shapes(preset: Preset, features: Features) -> contract.StageTensors:
    """The tensors between the stages for a preset and a prepared data set."""
    items, e, columns = features.item_count(), preset.encoder, features.context
    count = min(preset.ranker.candidates, items - contract.FIRST_ID)
    causal = e.family != "bert4rec"
    return contract.StageTensors(
        e.history, count, items, e.width, e.time_bias, preset.ranker.memory or e.reads, rising=preset.ranker.rising,
        types=bool(columns.types and e.types and causal), slide=e.slide,
        context=len(columns.categoricals) if e.context and causal else 0,
        amounts=len(columns.continuous) if e.context and causal else 0,
        counted=len(columns.counted) if causal and preset.ranker.rising and preset.ranker.by_context else 0,
        same_item_s=preset.ranker.rising_same_item_s, user_events=preset.ranker.rising_user_events,
        minute_events=features.minute_events(), newcomers=preset.ranker.rising_newcomers,
        shown=preset.ranker.shown_rates,
    )  # fmt: skip
