"""What a server shows is logged under the id that its answer carries, joined with clicks and forgotten, on the real
Triton behind the guard."""

from __future__ import annotations

import urllib.request

import numpy as np
import pyarrow.parquet as pq
import tritonclient.grpc as grpcclient

from tests.support import PatientClient, logged, patient, wait_until
from vivace import contract
from vivace.client import inputs_of
from vivace.client_request import request_tensors
from vivace.impressions.files import SCHEMA, parts
from vivace.impressions.joined import join
from vivace.store.lmdb_store import LmdbStore


def test_shown_clicked_joined_and_forgotten(client, root, served, tmp_path, request):
    user = f"someone of {request.node.callspec.id}"
    answer = client.recommend(user, top_k=5, context={"device": "phone"})
    again = client.recommend(user, top_k=5, request_id=f"mine-{user}")
    assert len(answer.request_id) == 32 and again.request_id == f"mine-{user}"
    assert client.append(user, answer.items[2], "click", request_id=answer.request_id) == 1
    row = logged(root, answer.request_id)
    assert (row["user_id"], row["items"], row["scores"]) == (user, answer.items, answer.scores.tolist())
    assert (row["status"], row["variant"], row["context"]) == (answer.status, "b", '{"device": "phone"}')
    assert row["model_version"] == served[0].release.name.rpartition(".")[2] and 0 < row["latency_ms"] < 60_000
    logged(root, again.request_id)

    store = LmdbStore(root / "feature_store", readonly=True)
    join(root / "impressions", store, tmp_path / "joined.parquet")
    store.close()
    of_user = pq.read_table(tmp_path / "joined.parquet", filters=[("user_id", "=", user)]).to_pandas()
    assert of_user["clicked"].sum() == 1 and len(of_user) == 10
    clicked = of_user[of_user["clicked"]].iloc[0]
    assert (clicked["item_id"], clicked["position"], clicked["event_type"]) == (answer.items[2], 3, "click")

    assert "2 requests left the log of impressions" in client.forget(user)
    assert user not in {u for path in parts(root / "impressions") for u in pq.read_table(path)["user_id"].to_pylist()}


def test_rows_of_a_request_are_logged_apart_and_what_the_server_asks_itself_is_not(served, root):
    server = served[0]
    tensors = [(t, np.repeat(v, 2, axis=0)) for t, v in request_tensors("two rows", top_k=3)]
    tensors[-1][1][1] = 0  # the second row is at fault
    with grpcclient.InferenceServerClient(f"{server.host}:{server.grpc_port}") as raw:
        inputs = inputs_of(grpcclient, tensors)
        result = patient(lambda: raw.infer(contract.ENSEMBLE, inputs, request_id="of two"))
        patient(lambda: raw.infer(contract.ENSEMBLE, inputs_of(grpcclient, request_tensors("no id", top_k=3))))
        nobody = inputs_of(grpcclient, request_tensors("", top_k=3))
        session = {contract.SESSION: "of a visit"}
        patient(lambda: raw.infer(contract.ENSEMBLE, nobody, request_id="a visit", parameters=session))
    assert logged(root, "a visit")["session"] == "of a visit"
    assert result.as_numpy(contract.STATUS.name)[1, 0].startswith(b"error")
    assert logged(root, "of two/0")["items"] == [i.decode() for i in result.as_numpy(contract.ITEM_ID.name)[0]]
    rows = wait_until(
        lambda: [
            row for path in parts(root / "impressions") for row in pq.read_table(path, schema=SCHEMA).to_pylist()
            if row["user_id"] == "no id"
        ],
        "the request without an id",
    )  # fmt: skip
    assert len(rows[0]["request_id"]) == 32  # made, so that it is counted
    ids = [i for path in parts(root / "impressions") for i in pq.read_table(path)["request_id"].to_pylist()]
    assert contract.UNLOGGED not in ids and "of two/1" not in ids  # nobody was shown anything

    def counted() -> str:  # handed on with later requests
        with PatientClient(f"{server.host}:{server.grpc_port}") as client:
            client.recommend("no id", top_k=3)
        page = urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics").read().decode()
        return page if 'vivace_impressions_total{how="written"}' in page else ""

    page = wait_until(counted, "requests that were written, on the page of metrics", every_s=0.3)
    assert 'vivace_impressions_total{how="dropped"}' not in page
