"""A Transformer over the catalogue's text, pretrained by masked-language modelling (Devlin et al. 2019) on that text.

``vivace pretrain --objective text`` writes ``artifacts/<name>/text``: tokenizer, weights, and one vector an item, which
the retriever reads where its configuration says ``text_encoder``. Axis legend: B items, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from training.losses import full_softmax
from training.models.encoders import EncoderConfig, build_encoder
from vivace.checks import check_fields, check_minimum, check_positive, check_shares
from vivace.run import TEXT, Run

FOLDER, VECTORS, TOKENIZER, WEIGHTS = "text", "vectors.npy", "tokenizer.json", "weights.pt"
PAD, UNKNOWN, MASK, FIRST_TOKEN = 0, 1, 2, 3
SPECIAL = ["[PAD]", "[UNK]", "[MASK]"]
KEPT, REPLACED = 0.1, 0.1  # of the chosen tokens: left as they are, or replaced by a random one
PROBE_ITEMS = 512  # whose loss is watched


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text encoder and of its training."""

    width: int = 128
    """D, of token embeddings and states; a multiple of ``heads``."""
    layers: int = 2
    """Blocks of the encoder."""
    heads: int = 4
    """Attention heads of a block."""
    tokens: int = 64
    """S, first tokens of a text that are read."""
    vocabulary: int = 8000
    """Tokens of the byte-pair encoding at most."""
    epochs: int = 10
    """Passes over the texts."""
    batch_size: int = 64
    """Texts a step."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    share: float = 0.15
    """Tokens to be guessed, 0 < x < 1 (Devlin et al. 2019)."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_minimum(self, 1, "width", "layers", "heads", "tokens", "vocabulary", "epochs", "batch_size")
        check_positive(self, "learning_rate", "share")
        check_shares(self, "share")


def train_tokenizer(texts: list[str], vocabulary: int, more: Sequence[str] = ()) -> Tokenizer:
    """Byte-pair encoding of lower-cased text in Unicode's compatibility form; ``more`` special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[*SPECIAL, *more], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, texts: list[str], length: int) -> Tensor:
    """Token ids int64 [B, length] of each text's first tokens, padded on the right."""
    out = np.zeros((len(texts), length), np.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        ids = encoding.ids[:length]
        out[row, : len(ids)] = ids
    return torch.from_numpy(out)


class TextEncoder(nn.Module):
    """Tokens int64 [B, S] to states float32 [B, S, D]; every token sees every other."""

    def __init__(self, config: TextConfig, vocabulary: int) -> None:
        super().__init__()
        shape = EncoderConfig(
            width=config.width, layers=config.layers, heads=config.heads, history=config.tokens, family="bert4rec",
            dropout=0.1, position_bias="relative",
        )  # fmt: skip
        self.token = nn.Embedding(vocabulary, config.width, padding_idx=PAD)
        self.encoder = build_encoder(shape, config.tokens)
        self.norm = nn.LayerNorm(config.width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        embedded = self.token(tokens_BS) * self.token.embedding_dim**0.5
        states: Tensor = self.norm(self.encoder(embedded, tokens_BS != PAD))
        return states

    def loss(self, tokens_BS: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """(mean loss of guessing ``share`` of the tokens, their number)."""
        real = tokens_BS >= FIRST_TOKEN
        chosen = (torch.rand(tokens_BS.shape, device=tokens_BS.device) < share) & real
        chosen |= (~chosen.any(1, keepdim=True)) & (real.cumsum(1) == 1) & real  # at least one of each text
        how = torch.rand(tokens_BS.shape, device=tokens_BS.device)
        other = torch.randint(FIRST_TOKEN, len(self.bias), tokens_BS.shape, device=tokens_BS.device)
        seen = torch.where(how < KEPT, tokens_BS, torch.where(how < KEPT + REPLACED, other, MASK))
        states = self(torch.where(chosen, seen, tokens_BS))[chosen]
        return full_softmax(states, self.token.weight, self.bias, tokens_BS[chosen], FIRST_TOKEN), chosen.sum()

    def pooled(self, tokens_BS: Tensor) -> Tensor:
        """Mean state of each text's tokens float32 [B, D]; zero for a text without any."""
        known = (tokens_BS != PAD)[:, :, None].float()
        mean: Tensor = (self(tokens_BS) * known).sum(1) / known.sum(1).clamp_min(1)
        return mean


def standardise(vectors: Tensor, real: Tensor) -> Tensor:
    """Zero mean and unit variance over the ``real`` rows; the others are zero."""
    mean, deviation = vectors[real].mean(0), vectors[real].std(0).clamp_min(1e-6)
    return torch.where(real[:, None], (vectors - mean) / deviation, torch.zeros_like(vectors))


def item_vectors(root: Path) -> np.ndarray:
    """Vectors of all item ids float32 [V, D] that ``pretrain_text`` wrote."""
    Run(root).manifest(TEXT)
    vectors_VD: np.ndarray = np.load(root / FOLDER / VECTORS)
    return vectors_VD
