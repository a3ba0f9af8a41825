"""Models of an earlier catalogue over a later one: what was learned of an item stays with it.

Axis legend: V item ids, D width, K followers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from preprocessing.features import Features
from training.checkpoints import build_ranker, device, load_ranker, load_retrieval
from training.data.counters import item_tables
from training.learn.warm_start import finish_unseen
from training.models.item_table import item_attributes, words_by_id
from training.models.ranking import RankingModel
from training.models.retrieval import RetrievalModel
from training.presets import Preset
from vivace.contract import TEXT
from vivace.run import FINAL, Run

# read from the features
OF_CATALOGUE = ("items.categories", "items.lists", "items.numbers", "items.words", "items.vectors")
WORDS = "items.word.weight"
# of a ranker
OF_COUNTS = ("item.", "popularity", "follower_ids", "follower_weights", "categories", "lists", "numbers")


def grow(model: nn.Module, given: dict[str, Tensor], left: tuple[str, ...] = ()) -> None:
    """Loads the weights ``given`` of a model of fewer items: theirs are the first rows, the rest stays as ``model`` has
    it; names that begin with one of ``left`` too. Raises ValueError for a weight of another shape."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith(left or ("\0",)):
                continue
            old = given.get(name)
            if old is None or old.shape[1:] != value.shape[1:] or (old.dim() and len(old) > len(value)):
                came = "none" if old is None else list(old.shape)
                raise ValueError(f"refresh: {name}: expected a weight that fits {list(value.shape)}, got {came}")
            if old.dim():
                value[: len(old)] = old.to(value.device)
            else:
                value.copy_(old)


def _move_words(model: RetrievalModel, given: dict[str, Tensor], old: Features, new: Features, keep: int) -> None:
    """Each word keeps its vector, whatever its number is now; a word that is new starts from nothing."""
    ids = {word: i + 1 for i, word in enumerate(words_by_id(old.items()[TEXT].tolist(), keep))}
    table = model.state_dict()[WORDS]
    table.zero_()
    for i, word in enumerate(words_by_id(new.items()[TEXT].tolist(), keep)):
        if word in ids:
            table[i + 1] = given[WORDS][ids[word]]


def grown_retriever(old: Features, new: Features, preset: Preset, given: RetrievalModel) -> RetrievalModel:
    """The trained retriever ``given`` over the items of ``new``; those that it does not know stand where their nearest
    neighbours do, as items without a training event always have."""
    items, state = new.item_count(), given.state_dict()
    model = RetrievalModel(preset.encoder, items, torch.zeros(items), item_attributes(new, preset.encoder), new.context)
    with_words = WORDS in model.state_dict()
    grow(model, state, (*OF_CATALOGUE, *([WORDS] if with_words else [])))
    model = model.to(device())
    if with_words:
        _move_words(model, state, old, new, preset.encoder.text_tokens)
    if items > old.item_count():
        counts = model.popularity.cpu().double().numpy()
        finish_unseen(model, counts, new, preset.retrieval)
    return model.eval()


def counted_ranker(
    new: Features, preset: Preset, retriever: RetrievalModel, given: RankingModel, files: list[Path]
) -> RankingModel:
    """The trained ranker ``given`` over another retriever's vectors and the counts of ``files`` of sequences."""
    model = build_ranker(new, preset, retriever, files=files).to(device())
    retriever.to(device())
    grow(model, given.state_dict(), OF_COUNTS)
    return model.eval()


def _as_served(
    new: Features, preset: Preset, retriever: RetrievalModel, given: RankingModel, known: int
) -> RankingModel:
    """The trained ranker ``given`` as it is, over more items, of which it has counted nothing."""
    tables = item_tables(new, preset.ranker.followers)
    for counted in (tables.popularity, tables.follower_ids, tables.follower_weights):
        counted[known:] = 0
    names = tuple(head.name for head in new.schema.heads)
    model = RankingModel(preset.ranker, tables, retriever.cpu(), names, preset.ranking.weighting).to(device())
    retriever.to(device())
    grow(model, given.state_dict())
    return model.eval()


def served_models(run: Run, old: Features, new: Features, preset: Preset) -> tuple[RetrievalModel, RankingModel]:
    """What the run serves, the final fit where it has one, over the catalogue of ``new``. Raises StaleError where the
    run's parts do not belong together."""
    final = run.has(FINAL)
    retriever = grown_retriever(old, new, preset, load_retrieval(old, preset, run.root, final))
    given = load_ranker(old, preset, run.root, final=final)
    return retriever, _as_served(new, preset, retriever, given, old.item_count())
