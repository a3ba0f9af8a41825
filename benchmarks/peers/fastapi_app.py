"""FastAPI and PyTorch eager, as its tutorial has it: a plain endpoint, run in FastAPI's own threads.

VIVACE_ROOT names the run; VIVACE_TORCH_THREADS PyTorch's threads (its own default if absent).
"""

import os
from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import BaseModel, Field

from benchmarks.peers.eager import EagerRecommender

if "VIVACE_TORCH_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["VIVACE_TORCH_THREADS"]))
model = EagerRecommender(Path(os.environ["VIVACE_ROOT"]))
app = FastAPI()


class Question(BaseModel):
    history: list[str] = []
    top_k: int = Field(10, ge=1, le=100)


class Answer(BaseModel, extra="allow"):
    item_id: list[str]
    score: list[float]


@app.post("/predict")
def predict(question: Question) -> Answer:
    return Answer(**model([question.history], [question.top_k])[0])
