"""The GPU part of the results page is what its records render to."""

from __future__ import annotations

import json
import re

from benchmarks.gpu import table
from benchmarks.gpu.kernels import kind


def test_the_page_is_rendered_from_the_records():
    page = table.PAGE.read_text()
    part = page.partition(table.BEGIN)[2].partition(table.END)[0]
    names = re.findall(r"`(docs/benchmarks/gpu-[^`]+\.json)`", part)
    assert names, "the page names no record"
    assert part == "\n" + "\n".join(table.render(json.loads((table.CHECKOUT / n).read_text()), n) for n in names)


def test_what_did_not_run_is_named():
    steps = {
        "train": {"outcome": "stopped", "rows": [], "not_run": {"large": "no time", "base": "no time left"}},
        "grid": {"outcome": "ok", "rows": []},
    }
    text = table.render({"steps": steps, "gpu": "", "date": "d", "commit": "c", "cores": 2, "versions": {}}, "f.json")
    assert "- train: large: no time" in text and "1 further combinations" in text and "- train: stopped" in text
    assert "grid" not in text


def test_a_kernel_that_prepares_a_product_is_none():
    assert kind("triton_poi_fused__scaled_mm__to_copy_clamp") == "fused"
    assert kind("nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_coopA_bias_TNN") == "matrix products"
    assert kind("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma") == "attention"
