"""One bad request fails alone: good neighbours of every malformed one get the answer that they get without it."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from serving.service import service
from tests.support import PATIENCE_S, on_free_ports, patient, quiet, waited_too_long
from vivace import contract
from vivace.client import inputs_of, read_answer
from vivace.client_request import request_tensors

HISTORY = ["sku-00001", "sku-00002"]


def cut_short() -> list[grpcclient.InferInput]:
    """USER_ID promises nine bytes and has five."""
    inputs = inputs_of(grpcclient, request_tensors(history=HISTORY))
    inputs[0]._raw_content = b"\x09\x00\x00\x00abcde"
    return inputs


GOOD = inputs_of(grpcclient, request_tensors(history=HISTORY, top_k=5))
BAD = {
    **{f"deadline {value!r}": (GOOD, {"parameters": {"deadline_ms": value}}) for value in ("abc", "", "nan", "inf")},
    "a deadline that is true": (GOOD, {"parameters": {"deadline_ms": True}}),
    "a deadline long ago": (GOOD, {"parameters": {"deadline_ms": 5}}),
    "a parameter called almost so": (GOOD, {"parameters": {"deadline_ms_": "abc"}}),
    "a parameter that says so": (GOOD, {"parameters": {"x": "deadline_ms"}}),
    "filters that are none": (GOOD, {"parameters": {"filters": "[1"}}),
    "a string cut short": (cut_short(), {}),
    "bytes that are no text": (inputs_of(grpcclient, request_tensors(user_id=b"\xff")), {}),
    "TOP_K of 0": (inputs_of(grpcclient, request_tensors(top_k=0)), {}),
    "a user id of 1,025 bytes": (inputs_of(grpcclient, request_tensors(user_id="u" * 1025)), {}),
    "a long query": (inputs_of(grpcclient, request_tensors(query="q" * 5000)), {}),
    "missing inputs": (GOOD[:2], {}),
}


@pytest.fixture(scope="module", params=["", "fused"])
def server(request, root):
    options = on_free_ports(root / "model_repository", profile=request.param, guard=True)
    with service(options, quiet) as (running, _):
        yield running


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_fails_alone(server, name):
    inputs, more = BAD[name]
    address = f"{server.host}:{server.grpc_port}"
    with grpcclient.InferenceServerClient(address) as client:
        ask = partial(client.infer, contract.ENSEMBLE, GOOD, client_timeout=PATIENCE_S)
        expected = read_answer(patient(ask)).items
    failures: list[str] = []
    leaks: list[str] = []
    answered: list[list[str]] = []

    def neighbour() -> None:
        with grpcclient.InferenceServerClient(address) as client:
            for _ in range(15):
                try:
                    answered.append(read_answer(client.infer(contract.ENSEMBLE, GOOD, client_timeout=PATIENCE_S)).items)
                except InferenceServerException as error:
                    if not waited_too_long(error):
                        failures.append(str(error))

    def stranger() -> None:
        with grpcclient.InferenceServerClient(address) as client:
            for _ in range(15):
                try:
                    client.infer(contract.ENSEMBLE, inputs, client_timeout=PATIENCE_S, **more)
                except InferenceServerException as error:
                    if "Traceback" in str(error) or "/site-packages/" in str(error):
                        leaks.append(str(error))

    threads = [threading.Thread(target=neighbour) for _ in range(4)] + [threading.Thread(target=stranger)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not leaks and not failures and all(items == expected for items in answered) and answered
    assert server.running()


def test_an_inner_stage_refuses_what_only_it_could_be_sent(server):
    """Ids far out of range reach a stage only over the control socket; they fail alone all the same."""
    if "fused" in server.options.profile:
        pytest.skip("fused has no inner stage")
    with server.control_client() as client:
        config = client.get_model_config(contract.RESPONSE).config
        inputs = []
        for tensor in config.input:
            shape = [1, *(d if d > 0 else 1 for d in tensor.dims)]
            kind = {"RANKED_IDS": np.int64, "TOP_K": np.int32}.get(tensor.name, np.float32)
            value = np.full(shape, 2**40 if tensor.name == "RANKED_IDS" else 1, kind)
            if tensor.data_type == model_config_pb2.TYPE_STRING:
                value = np.full(shape, b"ok" if tensor.name == contract.STATUS.name else b"", object)
            datatype = {np.dtype(np.int64): "INT64", np.dtype(np.int32): "INT32", np.dtype(object): "BYTES"}
            inputs.append(grpcclient.InferInput(tensor.name, shape, datatype.get(value.dtype, "FP32")))
            inputs[-1].set_data_from_numpy(value)
        with pytest.raises(InferenceServerException, match=r"this request failed .IndexError."):
            client.infer(contract.RESPONSE, inputs, client_timeout=PATIENCE_S)


def test_a_string_cut_short_is_refused_over_http(server):
    client = httpclient.InferenceServerClient(f"{server.host}:{server.http_port}")
    tensors = request_tensors(history=HISTORY, top_k=5)
    inputs = inputs_of(httpclient, tensors)
    assert read_answer(client.infer(contract.ENSEMBLE, inputs)).items
    inputs[0]._raw_data = b"\x09\x00\x00\x00abcde"
    inputs[0]._parameters["binary_data_size"] = 9
    with pytest.raises(InferenceServerException, match="BYTES input is cut short"):
        client.infer(contract.ENSEMBLE, inputs)
    client.close()
