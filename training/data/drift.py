"""What held-out requests and their answers look like, by the compiled graphs: the reference of drift.

Those are the test requests: the ranker has learned from the validation ones, whose probabilities it therefore knows too
well, and they are the newest of the log. A final fit has learned from both, unless the test set came with the log.
Axis legend: B requests, N candidates, C values of a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from preprocessing.features import Features
from preprocessing.requests import words_of
from serving.runtime.drift import (
    NEWEST_TYPE,
    QUERY,
    SCORE,
    UNKNOWN_EDGES,
    UNKNOWN_SHARE,
    answer_names,
    context_names,
    inputs_of,
    of_requests,
)
from training.data import batches
from training.data.live import with_live
from training.presets import Preset, shapes
from vivace.contract import EVENT, FIRST_ID, NULL_ID, OOV_ID, StageTensors
from vivace.drift import Feature, Reference, category, number

REQUESTS = 2000  # at most: chance then moves a PSI of ten bins by .01
BATCH = 64
FIRST = 10  # items whose clicks are expected

Engine = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


def _feature(features: Features, name: str, values: np.ndarray, categories: dict[str, str]) -> Feature:
    if name == QUERY:
        return category(name, values, {0: "without", 1: "with"})
    if name in categories:
        words = words_of(features, categories[name], "(none)")
        return category(name, values, dict(enumerate(words.tolist())), (NULL_ID, OOV_ID))
    return number(name, values, UNKNOWN_EDGES if name == UNKNOWN_SHARE else None)


def reference(
    features: Features, preset: Preset, tensors: StageTensors, engine: Engine, learned: bool
) -> Reference | None:
    """Of up to ``REQUESTS`` test requests, or validation requests where there are none; None without either.
    ``engine``: inputs of retrieval to ids int64 [B, N], best first, and values float32 [B, C, N]; ``learned``: whether
    its models have learned from all of them."""
    part = next((p for p in ("test", "valid") if features.files(p)), None)
    if part is None:
        return None
    columns, schema = features.context, features.schema
    heads = [head.name for head in schema.heads]
    requests = batches.requests(features.files(part), heads, tensors.history, BATCH)
    of_inputs, of_answers, expected, clicked, count = [], [], 0.0, 0, 0
    for request in with_live(requests, features, part, shapes(preset, features)):
        inputs = request.inputs(tensors, schema.exclude_seen)
        ids_BN, values_BCN, *_ = engine(inputs)
        of_inputs.append(of_requests(tensors, columns, inputs_of(tensors, inputs), np.zeros(len(ids_BN), bool)))
        of_answers.append(values_BCN[:, :, 0])
        target_B = request.target_B.numpy()
        expected += float(np.where(ids_BN[:, :FIRST] >= FIRST_ID, values_BCN[:, 1, :FIRST], 0).sum()) if heads else 0
        clicked += int(((ids_BN[:, :FIRST] == target_B[:, None]).any(1) & (target_B >= FIRST_ID)).sum())
        count += len(ids_BN)
        if count >= REQUESTS:
            break
    if not count:
        return None
    values = {name: np.concatenate([of_batch[name] for of_batch in of_inputs]) for name in of_inputs[0]}
    if not len(next(iter(values.values()))):
        return None
    watched, _ = context_names(columns, tensors)
    categories = {f"context {name}": name for name in watched} | {NEWEST_TYPE: EVENT}
    judged = not learned and part == "test"
    values_CB = np.concatenate(of_answers).T
    answers = [number(n, v, judged=judged) for n, v in zip(answer_names(schema.heads), values_CB, strict=True)]
    assert answers[0].name == SCORE
    of_request = tuple(_feature(features, name, v, categories) for name, v in values.items())
    return Reference(part, count, tensors.history, of_request, tuple(answers), expected / count, clicked / count)
