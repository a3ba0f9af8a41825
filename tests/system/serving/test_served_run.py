"""A call with --url and without --name is about what the server serves, whichever run was prepared last here."""

from __future__ import annotations

import json
import shutil

import pytest

from serving.service import service
from tests.support import on_free_ports, own_copy, quiet, users_of_data, vivace
from vivace.manifest import MANIFEST


@pytest.fixture(scope="module")
def artifacts(root, tmp_path_factory):
    """The small shop, and beside it a run of other data that was prepared later."""
    folder = tmp_path_factory.mktemp("served")
    own_copy(root, folder)
    later = folder / "bystander" / "features"
    later.mkdir(parents=True)
    schema = json.loads((root / "features" / "schema.json").read_text())
    (later / "schema.json").write_text(json.dumps(schema | {"name": "bystander"}))
    (later / MANIFEST).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def server(artifacts):
    with service(on_free_ports(artifacts / "shop" / "model_repository", guard=True), quiet) as (server, _):
        yield server


def _calls(user, folder):
    (folder / "items.jsonl").write_text('{"item_id": "n", "title": "Alto kettle"}')
    file = str(folder / "items.jsonl")
    return (
        ("query", "--user", user),
        ("items", "upsert", file),
        ("items", "remove", file),
        ("forget", "nobody"),
    )


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_no_other_run_is_named(protocol, artifacts, server, root, tmp_path):
    url = f"{server.host}:{server.grpc_port if protocol == 'grpc' else server.http_port}"
    for call in _calls(min(users_of_data(root)), tmp_path):
        out = vivace(*call, "--url", url, "--protocol", protocol, "--artifacts", str(artifacts))
        assert out.returncode == 0, (call, out)
        assert f"server at {url}: data set shop, read as run shop" in out.stdout, (call, out)
        assert "bystander" not in out.stdout + out.stderr, (call, out)
        assert call[0] != "query" or "title" in out.stdout, out


def test_without_a_run_of_that_data_nothing_is_read_by_another_s_columns(artifacts, server, root, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(artifacts / "bystander", alone / "bystander")
    url = f"{server.host}:{server.grpc_port}"
    for call in _calls(min(users_of_data(root)), tmp_path):
        out = vivace(*call, "--url", url, "--artifacts", str(alone))
        assert "bystander" not in out.stdout + out.stderr, (call, out)
        if call[0] == "items":
            assert out.returncode == 1 and "data set shop, not in" in out.stderr and "--name" in out.stderr, out
        else:
            assert out.returncode == 0 and f"server at {url}: data set shop" in out.stdout, out
