"""The engine comparison runs on any machine and names what it could not run."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

import benchmarks.roofline as roofline


def test_it_runs_what_is_here_and_names_the_rest():
    import typer

    app = typer.Typer()
    app.command()(roofline.main)
    options = ["--preset", "tiny", "--batch", "1", "--batch", "3", "--candidates", "20", "--items", "100"]
    done = CliRunner().invoke(app, [*options, "--seconds", "0.01", "--no-compile", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.strip().splitlines()[-1])
    ran = {(r["engine"], r["format"]) for r in result["rows"]}
    assert ran >= {
        ("PyTorch eager", "fp32"),
        ("PyTorch eager", "bf16"),
        ("ONNX Runtime", "fp32"),
        ("ONNX Runtime", "fp8"),
    }
    assert all(r["share"] > 0 and r["ms"] > 0 for r in result["rows"])
    one, three = ([r["gflop"] for r in result["rows"] if r["batch"] == b] for b in (1, 3))
    assert all(b == 3 * a or abs(b - 3 * a) < 0.002 for a, b in zip(one, three, strict=True))
    if not torch.cuda.is_available():
        for kind in ("fp32", "fp16", "int8-qdq", "fp8"):
            assert (
                "CUDA device" in result["not_run"][f"TensorRT {kind}"]
                and "built" in result["not_run"][f"TensorRT {kind}"]
            )
