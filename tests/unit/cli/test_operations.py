"""What the operator's view makes of two looks at the server's metrics."""

from __future__ import annotations

import inspect
import json

import pytest

from vivace.cli import rollout
from vivace.cli.page.operations import between, plan_of, read_metrics
from vivace.cli.page.watch import _message

LOOK = """# TYPE nv_inference_count counter
nv_inference_count{{model="recommend",version="1"}} {calls}
nv_inference_count{{model="ranking",version="1"}} {rows}
nv_inference_count{{model="ranking",version="2"}} {trial}
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{{model="ranking",version="1"}} {runs}
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{{model="ranking",version="1"}} {queue}
# TYPE nv_inference_compute_infer_duration_us counter
nv_inference_compute_infer_duration_us{{model="ranking",version="1"}} {work}
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{{model="recommend",version="1"}} {spent}
# TYPE vivace_answers_total counter
vivace_answers_total{{how="full"}} {full}
"""


def test_two_looks_make_rates_batches_and_times():
    before = read_metrics(LOOK.format(calls=100, rows=100, trial=5, runs=50, queue=0, work=0, spent=0, full=100))
    after = read_metrics(
        LOOK.format(calls=140, rows=130, trial=15, runs=60, queue=80_000, work=160_000, spent=400_000, full=130)
    )
    seen = between(before, after, seconds=2.0)
    assert (seen["rate"], seen["mean_ms"], seen["answers"]) == (20.0, 10.0, {"full": 15.0})
    ranking = next(stage for stage in seen["stages"] if stage["model"] == "ranking")
    assert ranking == {"model": "ranking", "rate": 20.0, "batch": 4.0, "pending": 0.0, "queue": 2.0, "compute": 4.0}


def test_a_server_that_began_anew_counts_nothing_below_zero():
    before = read_metrics(LOOK.format(calls=100, rows=100, trial=5, runs=50, queue=9, work=9, spent=9, full=100))
    seen = between(before, read_metrics(""), seconds=1.0)
    assert seen["rate"] == 0 and seen["stages"] == []


def test_what_is_no_number_does_not_break_the_stream():
    """Triton's quantiles of a second without calls are NaN, which a browser's JSON does not know."""
    seen = json.loads(_message({"p50": float("nan"), "of": [float("inf"), 1.5]}).removeprefix("data: "))
    assert seen == {"p50": None, "of": [None, 1.5]}


def test_a_form_is_read_as_the_command_reads_its_options():
    form = {"version": 2, "percent": "5, 20%, 50", "wait": "2h", "shadow": 12.5, "least_quality": 0.9}
    plan = plan_of({**form, "interleave": False, "promote": True})
    assert plan == {
        "to": 2, "canary": (0.05, 0.2, 0.5), "wait": "7200", "shadow": 12.5, "least_quality": 0.9,
        "interleave": False, "promote": True,
    }  # fmt: skip
    assert plan.keys() <= inspect.signature(rollout.start).parameters.keys()
    assert plan_of({}) == {"to": 0, "canary": (0.05,), "wait": "600"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", True), ("version", -1), ("percent", "50,5"), ("percent", "0"), ("wait", "soon"), ("shadow", None),
     ("shadow", 101), ("least_quality", 1.1), ("least_quality", "high"), ("interleave", 1), ("promote", "yes")],
)  # fmt: skip
def test_what_a_form_cannot_mean_is_refused_by_its_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        plan_of({field: value})
