"""Hostile HTTP/1.1, byte by byte: bodies, lengths, encodings, headers, methods, paths, and connections that dawdle."""

from __future__ import annotations

import gzip
import json
import random
import urllib.parse
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.hostile.values import (
    DATATYPES,
    OUTPUTS,
    PUBLIC,
    STAGES,
    TEXTS,
    Column,
    as_json,
    changed,
    cut_strings,
    dumped,
    flipped,
    good,
    odd_parameter,
    odd_shape,
    packed,
)

MIB = 1 << 20


@dataclass(frozen=True)
class Wire:
    """Bytes for a connection, sent in ``pieces`` with ``pause_s`` between them. ``ending``: "read" waits for an answer,
    "half" closes the sending side first, "gone" hangs up."""

    pieces: list[bytes]
    ending: str = "read"
    pause_s: float = 0.0


def infer(model: str) -> str:
    return f"/v2/models/{model}/infer"


def message(path: str, body: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    lines = {"Host": "localhost", "Content-Length": str(len(body)), "Connection": "close"} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "replace") + body


def json_body(rng: random.Random) -> Wire:
    """KServe's JSON with parts that do not belong."""
    model, columns = good(rng, rng.choice((1, 1, 2, 64, 65)))
    return Wire([message(infer(model), dumped(rng, changed(rng, as_json(columns))))])


def parameters(rng: random.Random) -> Wire:
    """Parameters of the request, an input or an output that mean something elsewhere."""
    model, columns = good(rng)
    body = as_json(columns)
    body["outputs"] = [{"name": rng.choice(OUTPUTS)} for _ in range(rng.randrange(1, 4))]
    for _ in range(rng.randrange(1, 4)):
        holder = rng.choice((body, rng.choice(body["inputs"]), rng.choice(body["outputs"])))
        name, value = odd_parameter(rng)
        holder.setdefault("parameters", {})[name] = value
    if rng.random() < 0.4:
        del body["outputs"]
    text = dumped(rng, body)
    if rng.random() < 0.2:
        text = text.replace(b"classification", b"cl\\u0061ssification")
    return Wire([message(infer(model), text)])


def binary(rng: random.Random) -> Wire:
    """The binary-data extension with sizes, shapes and strings that lie."""
    model, columns = good(rng, rng.choice((1, 1, 3)))
    inputs, parts = [], []
    for column in columns:
        raw = packed(column.values, column.datatype)
        if rng.random() < 0.15:
            raw = cut_strings(rng, raw)
        size = len(raw) if rng.random() < 0.93 else rng.choice((0, -1, len(raw) + 1, 2**31, 2**63, "9", 1.5, None))
        entry = {"name": column.name, "datatype": column.datatype, "shape": column.shape}
        if rng.random() < 0.1:
            entry["shape"] = odd_shape(rng)
        if rng.random() < 0.1:
            entry["datatype"] = rng.choice(DATATYPES)
        inputs.append(entry | {"parameters": {"binary_data_size": size}})
        parts.append(raw)
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    length = (
        str(len(head)) if rng.random() < 0.7 else rng.choice(("0", "-1", "1", str(len(head) + 5), "400x", "9" * 30))
    )
    return Wire([message(infer(model), head + b"".join(parts), {"Inference-Header-Content-Length": length})])


def garbage(rng: random.Random) -> Wire:
    body = rng.choice(
        (rng.randbytes(rng.randrange(2000)), b"[" * rng.randrange(60, 70), b"{}", b"null", b"", b"\xef\xbb\xbf{}")
    )
    return Wire([message(infer(rng.choice(PUBLIC)), body)])


def nested(rng: random.Random) -> Wire:
    deep = rng.choice((63, 64, 65, 1000, 100_000))
    where = rng.choice(("data", "parameters", "outputs"))
    inner = "[" * deep + '"a"' + "]" * deep if rng.random() < 0.7 else '{"a":' * deep + "1" + "}" * deep
    column = f'{{"name":"USER_ID","datatype":"BYTES","shape":[1,1],"data":{inner if where == "data" else "[0]"}}}'
    more = "" if where == "data" else f',"{where}":{inner}'
    return Wire([message(infer(rng.choice(PUBLIC)), f'{{"inputs":[{column}]{more}}}'.encode())])


def huge(rng: random.Random) -> Wire:
    """Long texts, long histories and bodies about the limit."""
    model, columns = good(rng)
    which, size = rng.randrange(len(columns)), rng.choice((5000, 100_000, 2 * MIB, 7 * MIB, 9 * MIB))
    column = columns[which]
    if rng.random() < 0.5:
        columns[which] = Column(column.name, column.datatype, column.shape, ["u" * size])
    else:
        count = min(size // 20, 120_000)
        columns[which] = Column(column.name, column.datatype, [1, count], column.values[:1] * count)
    return Wire([message(infer(model), json.dumps(as_json(columns)).encode())])


def encoded(rng: random.Random) -> Wire:
    """Compressed, or said to be."""
    model, columns = good(rng)
    plain = rng.choice((json.dumps(as_json(columns)).encode(), bytes(2 * MIB)))
    body = rng.choice((gzip.compress(plain), zlib.compress(plain), plain[:100], gzip.compress(plain)[:-9]))
    encoding = rng.choice(("gzip", "deflate", "br", "zstd", "identity", "gzip, gzip", "", "GZIP", "chunked"))
    return Wire([message(infer(model), body, {"Content-Encoding": encoding})])


def headers(rng: random.Random) -> Wire:
    """Too many, too long, of no form, or of someone else."""
    model, columns = good(rng)
    bombs: list[dict[str, str]] = [
        {f"x-{n}": "1" for n in range(rng.choice((60, 70, 500)))},
        {"x": "y" * rng.choice((6000, 7200, 8300, 100_000))},
        {"Host": rng.choice(("", "evil.example", "a b", "[::1]", "127.0.0.1:1", "x" * 3000))},
        {"Origin": "http://evil.example", "Content-Type": "text/plain"},
        {"Transfer-Encoding": rng.choice(("chunked", "gzip, chunked", "identity", "Chunked", "xchunked"))},
        {"Content-Length": rng.choice(("-1", "1, 1", "0x10", "1e3", "9" * 25, " 5", "+5", ""))},
        {"Expect": rng.choice(("100-continue", "magic"))},
        {"Upgrade": rng.choice(("h2c", "websocket")), "Connection": "Upgrade", "HTTP2-Settings": "AAMAAABk"},
        {rng.choice(("x y", "x\x00", "", "é", ":path", "x:")): "1"},
        {"x": rng.choice(("a\x00b", "a\r b", "a\n b", "\x7f", "é"))},
        {"x-vivace-model": "response", "vivace-key": "x", "triton-grpc-protocol-vivace-key": "x"},
        {"traceparent": rng.choice(("00-" + "0" * 32 + "-0-01", "x" * 900, "00-ff"))},
        {"timeout": "x", "X-Forwarded-For": "1.2.3.4"},
        {"X-Envoy-Retry-On": "5xx", "X-Envoy-Upstream-Rq-Timeout-Ms": "1"},
    ]  # fmt: skip
    return Wire([message(infer(model), json.dumps(as_json(columns)).encode(), rng.choice(bombs))])


APIS = (
    "repository/index", "repository/models/x/load", "repository/models/recommend/unload", "logging", "trace/setting",
    "systemsharedmemory/region/x/register", "systemsharedmemory/status", "cudasharedmemory/status", "models/stats",
    "models/recommend/stats", "models/recommend/trace/setting", "models/recommend/generate", "models/recommend",
    "models/recommend/generate_stream", "models/recommend/versions/1/infer", "models/recommend/versions/0/infer",
    "models/append_event/config", "health/ready", "", *(f"models/{stage}/infer" for stage in STAGES),
)  # fmt: skip


METHODS = ("POST", "GET", "POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "post", "X" * 50)


def paths(rng: random.Random) -> Wire:
    """Management calls, inner stages, and spellings of them that a filter may overlook."""
    path = "/v2/" + rng.choice(APIS)
    tricks: list[Callable[[str], str]] = [
        lambda p: p,
        lambda p: p.replace("/", "//"),
        lambda p: p.replace("/v2/", "/v2/models/recommend/../../"),
        lambda p: p.replace("/v2/", "/v2/models/recommend/%2e%2e/%2E%2e/"),
        lambda p: p.replace("/", "%2f")[3:],
        lambda p: p.replace("/", "\\"),
        lambda p: "http://localhost" + p,
        lambda p: "/" + urllib.parse.quote(p[1:], safe="")[: rng.randrange(1, 90)],
        lambda p: "".join(f"%{ord(c):02x}" if c.isalpha() else c for c in p),
        lambda p: p + rng.choice(("?x=1", "#x", ";x", "/", "/.", "%00", "%0d%0aX: y", " ", "/..;/")),
        lambda p: p.upper(),
        lambda p: p.lstrip("/"),
        lambda p: p + "a" * rng.choice((100, 7000)),
        lambda p: p.replace("/infer", "%2Finfer").replace("/v2", "/./v2/."),
    ]
    method = rng.choice(
        ("POST", "GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "post", "X" * 50)
    )
    return Wire([message(rng.choice(tricks)(path), b"{}", method=method)])


def lengths(rng: random.Random) -> Wire:
    """Chunks, and lengths that are not the body's."""
    model, columns = good(rng)
    body = json.dumps(as_json(columns)).encode()
    head = f"POST {infer(model)} HTTP/1.1\r\nHost: x\r\n"
    chunk = rng.choice((1, 2, 7, 4000))
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(body[i : i + chunk]), body[i : i + chunk]) for i in range(0, len(body), chunk)
    )
    wrong = rng.choice((b"zz\r\n", b"-1\r\n", b"f" * 17 + b"\r\n", b"2;ext=1\r\nAA\r\n", b"2\nAA\n"))
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()
    forms = [
        Wire([chunked, chunks, b"0\r\n\r\n"]),
        Wire([chunked, chunks, rng.choice((b"0\r\nx: y\r\n\r\n", b"0\r\n" + b"t: 1\r\n" * 500 + b"\r\n"))]),
        Wire([chunked, wrong], "half"),
        Wire([chunked, *[b"2\r\nAA\r\n" * 20_000] * rng.choice((1, 20)), b"0\r\n\r\n"]),
        Wire([f"{head}Content-Length: {len(body) + 9}\r\n\r\n".encode() + body], rng.choice(("half", "gone"))),
        Wire([f"{head}Content-Length: {len(body) - 9}\r\n\r\n".encode() + body]),
        Wire([f"{head}Content-Length: 5\r\nContent-Length: 6\r\n\r\n".encode() + body]),
        Wire([f"{head}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()]),
        Wire([head.encode() + b"\r\n" + body]),
    ]  # fmt: skip
    return rng.choice(forms)


def dawdling(rng: random.Random) -> Wire:
    """In small pieces, or never to the end."""
    model, columns = good(rng)
    whole = message(infer(model), json.dumps(as_json(columns)).encode())
    cuts = sorted(rng.sample(range(1, len(whole)), 4))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    kept = len(pieces) if rng.random() < 0.5 else rng.randrange(1, len(pieces))
    return Wire(pieces[:kept], "read" if kept == len(pieces) else rng.choice(("half", "gone")), rng.choice((0.02, 0.2)))


def raw(rng: random.Random) -> Wire:
    """No HTTP, old HTTP, or several requests in one go."""
    model, columns = good(rng)
    whole = message(infer(model), json.dumps(as_json(columns)).encode(), {"Connection": "keep-alive"})
    forms = [
        rng.randbytes(rng.randrange(1, 3000)),
        whole.replace(b"HTTP/1.1", rng.choice((b"HTTP/1.0", b"HTTP/9.9", b""))),
        whole.replace(b"\r\n", b"\n"), flipped(rng, whole), whole * rng.randrange(2, 20), b"\r\n" * 50 + whole,
        whole + b"GET /v2/logging HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET " + rng.choice(TEXTS).encode("utf-8", "replace") + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(90),
    ]  # fmt: skip
    return Wire([rng.choice(forms)], rng.choice(("read", "half", "gone")))


KINDS: dict[str, Callable[[random.Random], Wire]] = {
    kind.__name__: kind
    for kind in (
        json_body, parameters, binary, garbage, nested, huge, encoded, headers, paths, lengths, dawdling, raw
    )
}  # fmt: skip
