"""The GPU part of the results page is what its record renders to."""

from __future__ import annotations

import json
import re

from benchmarks.gpu import table
from benchmarks.gpu.kernels import kind


def test_the_page_is_rendered_from_the_record():
    page = table.PAGE.read_text()
    part = page.partition(table.BEGIN)[2].partition(table.END)[0]
    match = re.search(r"`(docs/benchmarks/gpu-[^`]+\.json)`", part)
    assert match is not None, "the page names no record"
    record = json.loads((table.CHECKOUT / match[1]).read_text())
    assert part == "\n" + table.render(record, match[1])


def test_what_did_not_run_is_named():
    steps = {
        "train": {"outcome": "stopped", "rows": [], "not_run": {"large": "no time", "base": "no time left"}},
        "grid": {"outcome": "ok", "rows": []},
    }
    text = table.render({"steps": steps, "gpu": "", "date": "d", "commit": "c"}, "f.json")
    assert "- train: large: no time" in text and "1 further combinations" in text and "- train: stopped" in text
    assert "grid" not in text


def test_a_kernel_that_prepares_a_product_is_none():
    assert kind("triton_poi_fused__scaled_mm__to_copy_clamp") == "fused"
    assert kind("nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_coopA_bias_TNN") == "matrix products"
    assert kind("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma") == "attention"
