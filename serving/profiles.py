"""Named ways to serve the same answers: what the profiles of ``config.pbtxt`` are rendered from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class ServingProfile:
    """What does not change the answer. Batches in requests, delay in microseconds, threads per session."""

    max_batch_size: int = 64
    preferred_batch: int = 0  # batches of this and its doubles are sent without delay (0: only the largest)
    queue_delay_us: int = 0
    retrieval_instances: int = 2  # the longest stage: with one, the other cores wait for it
    ranking_instances: int = 1
    threads: int = 1
    backend: str = "onnxruntime"  # of retrieval and ranking
    kind: Literal["CPU", "GPU", "MODEL"] = "CPU"  # where their instances run; MODEL: where the compiled file says
    cuda_graphs: bool = False  # sequences of kernels are recorded for some sizes of batches and replayed
    container: bool = False  # for the container's own backend, where that reads another configuration than ours
    state_cache: bool = False  # of encoded users; Triton then leaves retrieval out of its latency summaries
    fused: bool = False  # one model in the ensemble's place, of ``recommend_instances``
    recommend_instances: int = 2
    history: int = 0  # newest events that are read (0: as many as were trained)
    ranked: int = 0  # candidates that are ranked where stages are fused (0: all)
    overload_rows: int = 0  # where stages are fused, batches of so many rows are a sign of overload (0: none are)
    max_queue: int = 512  # requests that wait for a stage; more are refused at once
    queue_timeout_us: int = 1_000_000  # a request that waited so long for a stage is refused


ENSEMBLE = "ensemble"  # what --profile calls config.pbtxt: the profile "" of a repository
ONE_PROCESS = "fused"

_GPU = ServingProfile(max_batch_size=256, queue_delay_us=200, retrieval_instances=1, kind="GPU")
PROFILES = {
    "": ServingProfile(),
    "cached": ServingProfile(state_cache=True),
    ONE_PROCESS: ServingProfile(fused=True, overload_rows=32, max_queue=128),
    "openvino": ServingProfile(backend="openvino"),
    "gpu": _GPU,
    "tensorrt": replace(_GPU, backend="tensorrt"),
    "tensorrt-graphs": replace(_GPU, backend="tensorrt", cuda_graphs=True),
    "aoti": replace(_GPU, backend="pytorch", kind="MODEL"),
    "aoti-container": replace(_GPU, backend="pytorch", container=True, max_batch_size=1),
}
