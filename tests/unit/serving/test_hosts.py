"""Where servers on other machines are, as text."""

import pytest

from serving.door.hosts import Host, Upstream, parse_hosts
from serving.wheel import ServerError


def test_ports_are_those_of_a_server_unless_others_are_named():
    assert parse_hosts("127.0.0.1, 127.0.0.2:9000,127.0.0.3:9000:9001") == (
        Host("127.0.0.1", "127.0.0.1", 8000, 8001),
        Host("127.0.0.2", "127.0.0.2", 9000, 8001),
        Host("127.0.0.3", "127.0.0.3", 9000, 9001),
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "got none"),
        ("127.0.0.1:0", "expected HOST, HOST:HTTP or HOST:HTTP:GRPC"),
        ("127.0.0.1:1:2:3", "expected HOST, HOST:HTTP or HOST:HTTP:GRPC"),
        ("127.0.0.1,127.0.0.1:8000", "is there twice"),
    ],
)
def test_what_is_no_list_of_servers_is_refused(text, why):
    with pytest.raises(ServerError, match=why):
        parse_hosts(text)


def test_a_certificate_alone_would_be_shown_to_anyone(tmp_path):
    with pytest.raises(ServerError, match="--hosts-cert: expected --hosts-ca with it"):
        Upstream(hosts=parse_hosts("127.0.0.1"), cert=tmp_path / "a.pem")
