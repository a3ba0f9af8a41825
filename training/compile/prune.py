"""Structured pruning of a trained retriever: whole layers, attention heads, feed-forward channels and embedding
dimensions go; what is left is a smaller dense model of the same family, which recovery training takes up.

Importance of a group of weights: |sum of weight x gradient| over batches, the first-order change of the loss if the
group were zero (Molchanov et al. 2019, eq. 8); of a layer: how much the loss rises without it, measured.
Axis legend: B windows, T events, V item ids, D width, A heads, E width of a head, F feed-forward channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from training.models.encoders import Attention, EncoderConfig
from training.models.item_table import ItemAttributes, ItemLists
from training.models.retrieval import RetrievalModel

Loss = Callable[[RetrievalModel, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be left of a retriever: 0 leaves a size as it is."""

    layers: int = 0
    """Layers of the encoder."""
    heads: int = 0
    """Attention heads in each layer."""
    ffn: int = 0
    """Feed-forward channels in each layer."""
    width: int = 0
    """Embedding dimensions."""

    def of(self, config: EncoderConfig) -> EncoderConfig:
        """The smaller configuration. Raises ValueError where it is not smaller or the family cannot be pruned."""
        if config.family not in ("sasrec", "bert4rec") or config.adapter:
            raise ValueError(f"pruning: expected a sasrec or bert4rec encoder without adapters, got {config.family!r}")
        whole = {"layers": config.layers, "heads": config.heads, "ffn": config.of_ffn, "width": config.width}
        for name, size in whole.items():
            if not 0 <= getattr(self, name) <= size:
                raise ValueError(f"pruning: {name}: expected 1 to {size}, or 0 to leave it, got {getattr(self, name)}")
        return replace(
            config, layers=self.layers or config.layers, heads=self.heads or config.heads, head_width=config.of_head,
            ffn_width=self.ffn or config.of_ffn, width=self.width or config.width,
        )  # fmt: skip


@dataclass(frozen=True)
class Importance:
    """Larger is dearer: ``layers`` float [layers], ``heads`` [layers, A], ``ffn`` [layers, F], ``width`` [D]."""

    layers: Tensor
    heads: Tensor
    ffn: Tensor
    width: Tensor


def _blocks(model: RetrievalModel) -> list[nn.Module]:
    assert isinstance(model.encoder, Attention)
    return list(model.encoder.blocks)


def width_axes(name: str, shape: Sequence[int], width: int) -> list[int]:
    """Axes of a parameter that count embedding dimensions."""
    last = name.rsplit(".", 2)
    if name.startswith("encoder.blocks.") and last[-2] in ("qkv", "up"):
        return [1] if last[-1] == "weight" else []
    if name.startswith("encoder.blocks.") and last[-2] in ("out", "down"):
        return [0]
    if name.startswith(("items.vector", "items.number")):
        return [0]
    return [len(shape) - 1] if len(shape) and shape[-1] == width and name != "bias" and "bias_RA" not in name else []


def measure(model: RetrievalModel, batches: Sequence[Tensor], loss: Loss) -> Importance:
    """Importance of every layer, head, channel and dimension on ``batches`` of windows; the model is left unchanged."""
    model.eval()
    blocks, config = _blocks(model), model.config
    a, e = config.heads, config.of_head
    heads, ffn = torch.zeros(len(blocks), a), torch.zeros(len(blocks), config.of_ffn)
    width = torch.zeros(config.width)
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        with torch.no_grad():
            taylor = {n: (p * p.grad).cpu() for n, p in model.named_parameters() if p.grad is not None}
            for i in range(len(blocks)):
                block = f"encoder.blocks.{i}."
                qkv = taylor[block + "qkv.weight"].sum(1) + taylor[block + "qkv.bias"]
                out = taylor[block + "out.weight"].sum(0)
                heads[i] += (qkv.view(3, a, e).sum((0, 2)) + out.view(a, e).sum(1)).abs()
                up = taylor[block + "up.weight"].sum(1) + taylor[block + "up.bias"]
                ffn[i] += (up + taylor[block + "down.weight"].sum(0)).abs()
            change_D = torch.zeros(config.width)
            for name, value in taylor.items():
                for axis in width_axes(name, value.shape, config.width):
                    change_D += value.sum([x for x in range(value.dim()) if x != axis]) if value.dim() > 1 else value
            width += change_D.abs()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        whole = sum(float(loss(model, b)) for b in batches)
        lost = []
        for i in range(len(blocks)):
            with without(model, i) as shorter:
                lost.append(sum(float(loss(shorter, b)) for b in batches) - whole)
    return Importance(torch.tensor(lost), heads, ffn, width)


@contextmanager
def without(model: RetrievalModel, layer: int) -> Iterator[RetrievalModel]:
    """``model`` as it is without one layer, inside the block."""
    assert isinstance(model.encoder, Attention)
    blocks = model.encoder.blocks
    model.encoder.blocks = nn.ModuleList(block for i, block in enumerate(blocks) if i != layer)
    try:
        yield model
    finally:
        model.encoder.blocks = blocks


def _best(importance: Tensor, keep: int) -> Tensor:
    """Places of the ``keep`` largest values, in order."""
    return importance.topk(keep).indices.sort().values


def _smaller(model: RetrievalModel, config: EncoderConfig) -> RetrievalModel:
    """An untrained model of the smaller configuration over the same items."""
    attributes, items = None, model.items
    if items.known:
        sizes = tuple(len(category.weight) for category in items.category)  # type: ignore[arg-type]
        words = items.word.num_embeddings if items.word is not None else 1
        listed = tuple(len(values.weight) for values in items.listed)  # type: ignore[arg-type]
        lists = ItemLists(items.lists, listed) if listed else None
        attributes = ItemAttributes(items.categories, sizes, items.numbers, items.words, words, items.vectors, lists)
    return RetrievalModel(config, len(model.bias), model.popularity.clone(), attributes, model.columns)


def _kept_in_block(
    part: str, layer: int, model: EncoderConfig, small: EncoderConfig, importance: Importance
) -> dict[int, Tensor]:
    """Places that are kept of parameter ``part`` of the large model's ``layer``, by axis: of heads and channels."""
    a, e = model.heads, model.of_head
    heads, channels = _best(importance.heads[layer], small.heads), _best(importance.ffn[layer], small.of_ffn)
    columns = (heads[:, None] * e + torch.arange(e)).reshape(-1)
    if part.startswith("qkv"):
        return {0: torch.cat([third * a * e + columns for third in range(3)])}
    if part == "out.weight":
        return {1: columns}
    if part.startswith("up"):
        return {0: channels}
    if part == "down.weight":
        return {1: channels}
    return {1: heads} if part.endswith("bias_RA") else {}


def prune(model: RetrievalModel, importance: Importance, target: Target) -> RetrievalModel:
    """A smaller model with the most important parts of ``model``; its weights are slices."""
    config = target.of(model.config)
    layers, dimensions = _best(importance.layers, config.layers), _best(importance.width, config.width)
    small, given = _smaller(model, config), model.state_dict()
    fixed = {name for name, _ in small.named_buffers(remove_duplicate=False)}
    for name, value in small.state_dict().items():
        source, kept = name, dict[int, Tensor]()
        if name.startswith("encoder.blocks."):
            number, part = name.removeprefix("encoder.blocks.").split(".", 1)
            layer = int(layers[int(number)])
            source = f"encoder.blocks.{layer}.{part}"
            kept = _kept_in_block(part, layer, model.config, config, importance)
        full = given[source]
        for axis in width_axes(name, full.shape, model.config.width) if name not in fixed else []:
            kept[axis] = dimensions
        for axis, places in kept.items():
            full = full.index_select(axis, places.to(full.device))
        if full.shape != value.shape:
            raise ValueError(f"pruning: {name}: expected shape {list(value.shape)}, got {list(full.shape)}")
        value.copy_(full)
    return small
