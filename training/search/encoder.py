"""The text encoder of queries and items, and what teaches it.

1. Masked-language modelling and next-sentence prediction (is this the description that goes with this title?; Devlin et
   al. 2019) on the catalogue's text.
2. In-batch contrastive loss (InfoNCE, van den Oord et al. 2018) between an item and questions made of its own text:
   some of its words, its brand or colour among them, in any order. A second head learns which attribute values such a
   question comes from: the intent.
3. The same on judgments or clicks where there are any, with hard negatives: judged poorer, or found by words alone.

Queries and items share one Transformer (``training.models.text_encoder``). Axis legend: B texts, S tokens, E width of
the vectors, K values of all attributes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from search.data import Catalogue
from search.text import STOP, normalise
from search.understanding import Intent, likely, spans
from training.learn.loop import Loop, LoopConfig
from training.models.text_encoder import (
    FIRST_TOKEN,
    PAD,
    TOKENIZER,
    TextConfig,
    TextEncoder,
    tokens_of,
    train_tokenizer,
)
from vivace.checks import check_fields, check_minimum, check_positive

SEPARATOR = "[SEP]"
FILE, WEIGHTS = "encoder.json", "encoder.pt"
_WORD = re.compile(r"\w+(?:[.'-]\w+)*")


@dataclass(frozen=True, kw_only=True)
class SearchEncoderConfig:
    """Sizes and training of the encoder of queries and items."""

    text: TextConfig = field(default_factory=lambda: TextConfig(vocabulary=12_000))
    """The Transformer that queries and items share."""
    query_tokens: int = 24
    """S of a query."""
    vector: int = 128
    """E, width of the vectors."""
    values: int = 200
    """Most frequent values of each attribute that are told apart."""
    temperature: float = 0.05
    """Of the contrastive loss, above 0."""
    language_epochs: int = 2
    """Of language modelling on the catalogue's text."""
    question_epochs: int = 6
    """Of questions made of the items' text."""
    judged_epochs: int = 4
    """Of judgments or clicks."""
    epoch_items: int = 16_384
    """Items of an epoch; of a larger catalogue so many are drawn anew each time."""
    batch_size: int = 128
    """Texts a step."""
    learning_rate: float = 1e-3
    """Peak of the schedule of the first two stages."""
    judged_learning_rate: float = 2e-4
    """Peak of the schedule of judgments or clicks."""
    hard: int = 2
    """Hard negatives drawn for each judged pair."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 1, "query_tokens", "vector", "values", "epoch_items", "batch_size")
        check_minimum(self, 0, "language_epochs", "question_epochs", "judged_epochs", "hard")
        check_positive(self, "temperature", "learning_rate", "judged_learning_rate")


class SearchEncoder(nn.Module):
    """Token ids int64 [B, S] to unit vectors float32 [B, E]; intents: logits float32 [B, K]."""

    def __init__(self, config: SearchEncoderConfig, vocabulary: int, attributes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.config, self.attributes = config, {a: list(v) for a, v in attributes.items()}
        self.text = TextEncoder(config.text, vocabulary)
        self.project = nn.Linear(2 * config.text.width, config.vector)
        self.intent = nn.Linear(config.vector, sum(1 + len(v) for v in self.attributes.values()))
        self.follows = nn.Linear(config.text.width, 1)

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        known = (tokens_BS != PAD)[:, :, None].to(torch.float32)
        count = known.sum(1).clamp_min(1)
        words = (self.text.token(tokens_BS) * known).sum(1) / count * self.config.text.width**0.5
        states = (self.text(tokens_BS) * known).sum(1) / count
        vector_BE = F.normalize(self.project(torch.cat([states, words], 1)), dim=1)
        return vector_BE, self.intent(vector_BE * self.config.vector**0.5)


def item_texts(catalogue: Catalogue) -> list[str]:
    """What is read of an item: its fields in the catalogue's order."""
    return [normalise(" ".join(parts)) for parts in zip(*catalogue.texts.values(), strict=True)]


def known_values(catalogue: Catalogue, most: int) -> dict[str, list[str]]:
    """The most frequent values of each attribute, of at least two items."""
    return {
        a: [v for v, n in Counter(v for v in values if v).most_common(most) if n > 1]
        for a, values in catalogue.attributes.items()
    }


class Questions:
    """Questions made of items' own text, anew at each call: two to six words of its first field, at times with a value
    of an attribute, at times of its other text."""

    def __init__(self, catalogue: Catalogue) -> None:
        fields = list(catalogue.texts.values())
        cut = lambda t: [w for w in _WORD.findall(normalise(t)) if w not in STOP]  # noqa: E731
        self.title = [cut(t) for t in fields[0]]
        self.rest = [cut(" ".join(parts))[:60] for parts in zip(*fields[1:], strict=True)] if len(fields) > 1 else None
        singles = [[[value] for value in column] for column in catalogue.attributes.values()]
        self.values = [
            [normalise(value) for values in row for value in values if value]
            for row in zip(*singles, *catalogue.lists.values(), strict=True)
        ]

    def __call__(self, item: int, rng: np.random.Generator) -> str:
        source = self.title[item]
        if self.rest is not None and self.rest[item] and (not source or rng.random() < 0.25):
            source = self.rest[item]
        if not source:
            return " ".join(self.values[item]) if self.values else ""
        count = min(len(source), int(rng.integers(2, 7)))
        at = sorted(rng.choice(len(source), count, replace=False).tolist())
        if rng.random() < 0.5:  # words that stand together
            first = int(rng.integers(0, len(source) - count + 1))
            at = list(range(first, first + count))
        words = [source[i] for i in at]
        if self.values and self.values[item] and rng.random() < 0.3:
            words.insert(int(rng.integers(0, len(words) + 1)), str(rng.choice(self.values[item])))
        return " ".join(words)

    def by_attributes(self, item: int, rng: np.random.Generator) -> str:
        """Two or three of the item's attribute values, in any order: what kind of thing it is, not which one."""
        values = self.values[item] if self.values else []
        if len(values) < 2:
            return self(item, rng)
        count = min(len(values), int(rng.integers(2, 4)))
        return " ".join(str(v) for v in rng.permutation(values)[:count])


class EncoderTraining:
    """Trains one encoder on one catalogue; each stage is a loop of its own that resumes."""

    def __init__(
        self, catalogue: Catalogue, config: SearchEncoderConfig, folder: Path, seed: int, quiet: bool = False
    ) -> None:
        self.catalogue, self.config, self.folder, self.seed, self.quiet = catalogue, config, folder, seed, quiet
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        self.texts = item_texts(catalogue)
        path = folder / TOKENIZER
        if not path.exists():
            train_tokenizer(self.texts, config.text.vocabulary, [SEPARATOR]).save(str(path))
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokens = tokens_of(self.tokenizer, self.texts, config.text.tokens)
        self.model = SearchEncoder(config, self.tokenizer.get_vocab_size(), known_values(catalogue, config.values))
        nn.init.constant_(self.model.follows.weight, 0.0)
        self.labels = self._labels()

    def _labels(self) -> Tensor:
        """Position of each item's value within its attribute, int64 [V, attributes]: 0 for none or another."""
        columns = []
        for name, values, _ in spans(self.model.attributes):
            at = {v: i + 1 for i, v in enumerate(values)}
            columns.append([at.get(v, 0) for v in self.catalogue.attributes[name]])
        return torch.tensor(columns, dtype=torch.long).t() if columns else torch.zeros(len(self.texts), 0).long()

    def _loop(self, name: str, epochs: int, steps: int, rate: float, batches: Any, loss: Any) -> Loop:
        config = LoopConfig(
            epochs=epochs, steps_per_epoch=steps, learning_rate=rate, weight_decay=0.01, checkpoint_s=60.0,
            seed=self.seed,
        )  # fmt: skip
        loop = Loop(self.model, config, self.folder / name, name, batches, loss, dict, self.quiet)
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        loop.resume()
        return loop

    def _chosen(self, epoch: int, items: np.ndarray) -> Iterator[tuple[np.ndarray, np.random.Generator]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(items)[: self.config.epoch_items]
        for start in range(0, max(len(order) - self.config.batch_size // 2, 1), self.config.batch_size):
            yield order[start : start + self.config.batch_size], rng

    def language(self) -> None:
        """Masked-language modelling of the items' text and next-sentence prediction on (first field, the others)."""
        fields = [[normalise(t) for t in column] for column in self.catalogue.texts.values()]
        rest = [" ".join(parts) for parts in zip(*fields[1:], strict=True)] if len(fields) > 1 else []
        half, separator = self.config.text.tokens // 2, int(self.tokenizer.token_to_id(SEPARATOR) or 0)
        left = tokens_of(self.tokenizer, fields[0], half - 1)
        right = tokens_of(self.tokenizer, rest, half) if rest else None
        pairs = np.flatnonzero([bool(r.strip()) for r in rest]) if rest else np.empty(0, int)

        def of_epoch(epoch: int) -> Iterator[Any]:
            for chosen, rng in self._chosen(epoch, np.arange(len(self.texts))):
                first = torch.from_numpy(rng.choice(pairs, len(chosen))) if len(pairs) > 1 else None
                wrong = torch.from_numpy(rng.random(len(chosen)) < 0.5)
                other = torch.from_numpy(rng.choice(pairs, len(chosen))) if first is not None else None
                yield self.tokens[chosen], first, other, wrong

        def loss(batch: Any) -> tuple[Tensor, Tensor]:
            tokens, first, other, wrong = batch
            guess, count = self.model.text.loss(tokens, self.config.text.share)
            if first is None or right is None:
                return guess, count
            wrong = wrong & (first != other)
            second = torch.where(wrong, other, first)
            joined = torch.cat([left[first], torch.full((len(first), 1), separator), right[second]], 1)
            logit = self.model.follows(self.model.text.pooled(joined)).squeeze(1)
            return guess + F.binary_cross_entropy_with_logits(logit, (~wrong).float()), count

        steps = sum(1 for _ in self._chosen(0, np.arange(len(self.texts))))
        self._loop("language", self.config.language_epochs, steps, self.config.learning_rate, of_epoch, loss).run()

    def _contrast(self, queries_BS: Tensor, items_NS: Tensor, labels: Tensor, same: Tensor | None = None) -> Tensor:
        """InfoNCE of query i and item i against all items N >= B of the batch (those that are ``same`` bool [B, N] as
        the positive do not count), both ways over the first B; and the intent of the query."""
        q, logits = self.model(queries_BS)
        v, _ = self.model(items_NS)
        scores = q @ v.t() / self.config.temperature
        if same is not None:
            scores = scores.masked_fill(same, -1e4)
        target = torch.arange(len(q))
        total = F.cross_entropy(scores, target) + F.cross_entropy(scores[:, : len(q)].t(), target)
        for i, (_, _, span) in enumerate(spans(self.model.attributes)):
            total = total + 0.2 * F.cross_entropy(logits[:, span], labels[:, i])
        return total

    def questions(self) -> None:
        """Contrastive learning on questions made of the items."""
        make, epochs = Questions(self.catalogue), self.config.question_epochs
        usable = np.flatnonzero([bool(t) for t in self.texts])

        def of_epoch(epoch: int) -> Iterator[Any]:
            for chosen, rng in self._chosen(epoch, usable):
                yield chosen, tokens_of(self.tokenizer, [make(int(i), rng) for i in chosen], self.config.query_tokens)

        def loss(batch: Any) -> tuple[Tensor, Tensor]:
            chosen, queries = batch
            return self._contrast(queries, self.tokens[chosen], self.labels[chosen]), torch.tensor(len(chosen))

        steps = sum(1 for _ in self._chosen(0, usable))
        self._loop("questions", epochs, steps, self.config.learning_rate, of_epoch, loss).run()

    def judged(self, queries: Sequence[str], positives: Sequence[Sequence[int]], hard: Sequence[Sequence[int]]) -> None:
        """Fine-tuning: ``positives`` and ``hard`` negatives (rows of items) of each query. Half of each batch are made
        questions, so that what was learned of the whole catalogue stays."""
        tokens = tokens_of(self.tokenizer, [normalise(q) for q in queries], self.config.query_tokens)
        pairs = np.array([(q, i) for q, items in enumerate(positives) for i in items])
        good = [set(p) for p in positives]
        make, size = Questions(self.catalogue), self.config.batch_size // 2

        def of_epoch(epoch: int) -> Iterator[Any]:
            rng = np.random.default_rng([self.seed, 77, epoch])
            order = rng.permutation(pairs)
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                extra = [int(i) for q, _ in rows if len(hard[q]) for i in rng.choice(hard[q], self.config.hard)]
                made = rng.integers(0, len(self.texts), size)
                questions = tokens_of(self.tokenizer, [make(int(i), rng) for i in made], self.config.query_tokens)
                items = np.concatenate([rows[:, 1], made, np.array(extra, int)])
                owners = [good[q] for q in rows[:, 0]] + [{int(i)} for i in made]
                same = torch.tensor([[int(i) in good_items for i in items] for good_items in owners])
                same[torch.arange(len(owners)), torch.arange(len(owners))] = False
                yield torch.cat([tokens[rows[:, 0]], questions]), items, same

        def loss(batch: Any) -> tuple[Tensor, Tensor]:
            queries_BS, items, same = batch
            labels = self.labels[items[: len(queries_BS)]]
            return self._contrast(queries_BS, self.tokens[items], labels, same), torch.tensor(len(queries_BS))

        steps = -(-len(pairs) // size)
        rate = self.config.judged_learning_rate
        self._loop("judged", self.config.judged_epochs, steps, rate, of_epoch, loss).run()

    def finish(self) -> TextSearchEncoder:
        """Writes the encoder beside its tokenizer and reads it back."""
        record = {"config": asdict(self.config), "attributes": self.model.attributes}
        (self.folder / FILE).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        torch.save(self.model.state_dict(), self.folder / WEIGHTS)
        return TextSearchEncoder.load(self.folder)


class TextSearchEncoder:
    """Texts to unit vectors float32 [B, E], queries to vectors and intents, by the encoder trained here."""

    def __init__(self, model: SearchEncoder, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config

    @classmethod
    def load(cls, folder: Path) -> TextSearchEncoder:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        config = SearchEncoderConfig(**{**record["config"], "text": TextConfig(**record["config"]["text"])})
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        model = SearchEncoder(config, tokenizer.get_vocab_size(), record["attributes"])
        model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
        return cls(model, tokenizer)

    def items(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(texts, self.config.text.tokens)[0]

    def queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(vectors float32 [B, E], intent logits float32 [B, K]) of normalised texts."""
        return self._encode(texts, self.config.query_tokens)

    def _encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), 256):
                tokens = tokens_of(self.tokenizer, list(texts[start : start + 256]), length)
                tokens = tokens[:, : max(1, int((tokens >= FIRST_TOKEN).sum(1).max()))]
                parts.append(tuple(t.numpy() for t in self.model(tokens)))
        if not parts:
            return np.zeros((0, self.config.vector), np.float32), np.zeros((0, self.model.intent.out_features))
        vectors, intents = zip(*parts, strict=True)
        return np.concatenate(vectors), np.concatenate(intents)

    def intents(self, logits_K: np.ndarray) -> list[Intent]:
        return likely(self.model.attributes, logits_K)
