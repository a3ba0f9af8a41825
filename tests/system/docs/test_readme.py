"""The README's own text, run: its client call, its JSON, its mapping."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pandas as pd

from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers import open_source
from preprocessing.requests import recorded
from vivace import contract

CHECKOUT = Path(__file__).resolve().parents[3]
README = (CHECKOUT / "README.md").read_text()
USER = re.compile(r"user-\d{5}")


def block(language: str) -> str:
    """The README's first block of code in ``language``."""
    return re.search(rf"^```{language}\n(.*?)^```", README, re.M | re.S).group(1)


def test_the_client_call_answers_as_shown(root, served):
    server, _ = served
    code = block("python").replace("127.0.0.1:8001", f"{server.host}:{server.grpc_port}")
    code = USER.sub(recorded(root)[contract.USER][0], code)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT)
    assert out.returncode == 0, out.stderr
    shape = re.compile(r"\['sku-\d+'(, 'sku-\d+'){2}\] \[ *[-\d.e]+( +[-\d.e]+){2} *\] ok\n")
    assert shape.fullmatch(out.stdout), out.stdout
    assert shape.search(README)


def test_the_json_is_answered(root, served):
    server, _ = served
    body = re.search(r"^curl .*? -d '(.*?)'$", README, re.M | re.S).group(1)
    body = USER.sub(recorded(root)[contract.USER][0], body)
    url = f"http://{server.host}:{server.http_port}/v2/models/recommend/infer"
    with urllib.request.urlopen(urllib.request.Request(url, body.encode())) as answer:
        outputs = {o["name"]: o["data"] for o in json.load(answer)["outputs"]}
    assert len(outputs["ITEM_ID"]) == 3 and outputs["STATUS"] == ["ok"]


def test_the_mapping_prepares_a_log(tmp_path):
    """20 users of 6 events each on 10 items, in two files."""
    rows = [(f"u{u}", f"i{(u + e) % 10}", 1_700_000_000 + 60 * e) for u in range(20) for e in range(6)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "ts"])
    (tmp_path / "events").mkdir()
    for part in (0, 1):
        log[part::2].to_parquet(tmp_path / "events" / f"{part}.parquet")
    (tmp_path / "mapping.toml").write_text(block("toml"))
    source = open_source("tables", tmp_path / "mapping.toml", {})
    results = prepare(source, PrepareConfig(partitions=1), tmp_path / "run", 7, lambda _: None)["results"]
    assert (results["events"], results["users"], results["items_in_vocabulary"]) == (120, 20, 10)
    assert not any(results["rejected"].values())
