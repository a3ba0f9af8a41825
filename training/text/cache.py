"""What a tower made of each text, kept in a run's folder: encoded once, whatever item the text is of.

Axis legend: B texts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vivace.manifest import Progress

BLOCK = 1024  # texts of a file: what is lost when a run stops
PROGRESS_S = 10.0
Encode = Callable[[Sequence[str]], np.ndarray]


def text_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


class TextCache:
    """Arrays of texts by one encoder in ``folder``, block by block; a block is written whole or not at all.

    ``encode``: texts to an array [B, ...] of one dtype. The folder's name must hold what the arrays depend on beside
    the text. A block that cannot be read is encoded again."""

    def __init__(self, folder: Path, encode: Encode, label: str) -> None:
        self.folder, self.encode, self.label = folder, encode, label
        folder.mkdir(parents=True, exist_ok=True)
        self._rows: dict[bytes, np.ndarray] = {}
        self._next = 0
        for path in sorted(folder.glob("*.npz")):
            self._next = int(path.stem) + 1
            with np.load(path) as block:
                self._rows.update(zip((h.tobytes() for h in block["hashes"]), block["rows"], strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def _write(self, hashes: Sequence[bytes], rows_B: np.ndarray) -> None:
        path = self.folder / f"{self._next:06d}.npz"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as stream:
            of_texts = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)
            np.savez(stream, hashes=of_texts, rows=rows_B)
        partial.replace(path)
        self._next += 1
        self._rows.update(zip(hashes, rows_B, strict=True))

    def __call__(self, texts: Sequence[str], say: Progress) -> np.ndarray:
        """[B, ...] of ``texts``, one at least; only those that are new are encoded, the longest first."""
        hashes = [text_hash(t) for t in texts]
        missing = list({h: t for h, t in zip(hashes, texts, strict=True) if h not in self._rows}.items())
        missing.sort(key=lambda pair: -len(pair[1]))
        if missing:
            say(f"{self.label}: {len(missing):,} texts to encode, {len(self):,} are there")
        started = reported = time.monotonic()
        for start in range(0, len(missing), BLOCK):
            part = missing[start : start + BLOCK]
            self._write([h for h, _ in part], self.encode([t for _, t in part]))
            done, now = start + len(part), time.monotonic()
            if now - reported > PROGRESS_S and done < len(missing):
                left_s = (now - started) / done * (len(missing) - done)
                say(f"{self.label}: {done:,} of {len(missing):,} texts, at most {left_s:.0f} s to go")
                reported = now
        return np.stack([self._rows[h] for h in hashes])
