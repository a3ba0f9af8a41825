"""Candidates scored in micro-batches within the graph get the scores that they get all at once."""

from __future__ import annotations

import onnx
import pytest
import torch

from tests.unit.training.test_models import ITEMS, _ranker, _retriever
from training.compile.graphs.chunked import export_in_chunks
from training.models.encoders import EncoderConfig
from training.models.ranking import RankingGraph
from training.models.retrieval import EXCLUDED, RetrievalGraph
from vivace.context import ContextColumns
from vivace.contract import FIRST_ID, PADDING_ID
from vivace.onnx_session import open_session

INPUTS = ["HISTORY_IDS", "CANDIDATE_IDS", "CANDIDATE_SCORES", "ENCODED_HISTORY"]
OUTPUTS = ["RANKED_IDS", "RANKED_VALUES"]
CHUNK = 16
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


CONTEXT = "CONTEXT_IDS"  # read in the loop alone


@pytest.fixture(scope="module", params=["layers", "folded", "context"])
def both(request, tmp_path_factory):
    """(retriever, ranking graph, the same in chunks of CHUNK)."""
    columns = ContextColumns(categoricals=("device",), sizes=(9,)) if request.param == "context" else ContextColumns()
    retriever = _retriever(EncoderConfig(context=bool(columns.categoricals)), columns)
    graph = RankingGraph(_ranker(retriever, "mmoe"), folded=request.param == "folded").eval()
    path = tmp_path_factory.mktemp("chunked") / "ranking.onnx"
    given = _inputs(retriever, 40)
    export_in_chunks(CHUNK)(graph, given, [*INPUTS, CONTEXT][: len(given)], OUTPUTS, path, None)
    return retriever, graph, path


def _inputs(retriever, candidates: int) -> tuple[torch.Tensor, ...]:
    """Of four histories, one empty; the last candidates of one are none."""
    torch.manual_seed(3)
    history = torch.randint(FIRST_ID, ITEMS, (4, 12))
    history[1, :7], history[2] = PADDING_ID, PADDING_ID
    exclude = torch.zeros(4, ITEMS, dtype=torch.bool)
    exclude[3, FIRST_ID + 5 :] = True
    context = [torch.randint(0, 9, (4, 1))] if retriever.read_context.categoricals else []
    with torch.no_grad():
        return (history, *RetrievalGraph(retriever, candidates)(history, exclude, *context), *context)


@pytest.mark.parametrize("candidates", [1, CHUNK - 1, CHUNK, CHUNK + 1, 57])
def test_scores_are_those_of_all_at_once(both, candidates):
    retriever, graph, path = both
    inputs = _inputs(retriever, candidates)
    assert candidates < 8 or (inputs[2] < EXCLUDED / 2).any()
    with torch.no_grad():
        expected_ids, expected = graph(*inputs)
    ids, values = open_session(path).run(
        OUTPUTS, dict(zip([*INPUTS, CONTEXT], (x.numpy() for x in inputs), strict=False))
    )
    torch.testing.assert_close(torch.from_numpy(values), expected, **CLOSE)
    assert (torch.from_numpy(ids) == expected_ids).float().mean() > 0.98  # equal scores may change places
    assert ids.shape == (4, candidates)


def test_what_is_of_the_history_alone_stands_before_the_loop(both):
    *_, path = both
    graph = onnx.load(path).graph
    (loop,) = (node for node in graph.node if node.op_type == "Loop")
    (body,) = (a.g for a in loop.attribute if a.name == "body")
    read = {name for node in body.node for name in node.input}
    assert {"KEYS", "VALUES", "NEWEST_EVENT"} <= read and "ENCODED_HISTORY" not in read
    assert len({i.name for i in graph.initializer}) == len(graph.initializer) and len(body.initializer) == 1


def test_events_that_are_chosen_by_all_candidates_are_refused(tmp_path):
    retriever = _retriever(EncoderConfig())
    graph = RankingGraph(_ranker(retriever, "mmoe", nearest=3, nearest_to="request", memory=4))
    with pytest.raises(ValueError, match=r"--at-once: .* 'request'"):
        export_in_chunks(CHUNK)(graph, _inputs(retriever, 10), INPUTS, OUTPUTS, tmp_path / "ranking.onnx", None)
