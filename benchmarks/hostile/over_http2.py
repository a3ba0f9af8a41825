"""Hostile HTTP/2, frame by frame: resets, many streams, half-closed ones, floods, lengths and headers that lie."""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.hostile.over_http import Wire

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
INFER = "/inference.GRPCInferenceService/ModelInfer"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + (stream & 0xFFFFFFFF).to_bytes(4, "big") + payload


def _text(value: str | bytes) -> bytes:
    """An HPACK string without Huffman."""
    raw = value.encode("utf-8", "replace") if isinstance(value, str) else value
    size, out = len(raw), b""
    if size < 127:
        return bytes([size]) + raw
    size -= 127
    while size >= 128:
        out, size = out + bytes([size % 128 + 128]), size // 128
    return b"\x7f" + out + bytes([size]) + raw


def fields(pairs: list[tuple[str, str]]) -> bytes:
    """HPACK literals that enter no table."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in pairs)


def request(path: str = INFER, more: tuple[tuple[str, str], ...] = ()) -> list[tuple[str, str]]:
    pseudo = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
    return [*pseudo, ("content-type", "application/grpc"), ("te", "trailers"), *more]


def opening(stream: int, flags: int = END_HEADERS, pairs: list[tuple[str, str]] | None = None) -> bytes:
    return frame(HEADERS, flags, stream, fields(pairs or request()))


def start(rng: random.Random) -> bytes:
    """The preface and settings, good ones mostly."""
    odd = rng.choice(
        (b"", b"", b"\x00\x04\xff\xff\xff\xff", b"\x00\x05\x00\x00\x00\x01", b"\x00\x02\x00\x00\x00\x09", b"\x00")
    )
    return PREFACE + frame(SETTINGS, 0, 0, odd)


def resets(rng: random.Random) -> list[bytes]:
    """Streams opened and reset at once."""
    count = rng.choice((5, 50, 300))
    code = rng.choice((0, 8, 255)).to_bytes(4, "big")
    return [b"".join(opening(2 * n + 1) + frame(RST, 0, 2 * n + 1, code) for n in range(count))]


def streams(rng: random.Random) -> list[bytes]:
    """Many open at once, none of them finished, or each with a message that is none."""
    count, body = rng.choice((50, 1100)), rng.choice((b"", bytes(5), b"\0\0\0\0\x05abcde", b"\0\xff\xff\xff\xffx"))
    out = b"".join(opening(2 * n + 1) for n in range(count))
    return [out, b"".join(frame(DATA, END_STREAM, 2 * n + 1, body) for n in range(min(count, 200)))]


def half_closed(rng: random.Random) -> list[bytes]:
    late = rng.choice(
        (frame(DATA, 0, 1, b"more"), opening(1), frame(WINDOW, 0, 1, bytes(4)), frame(RST, 0, 1, bytes(4)))
    )
    return [opening(1, END_HEADERS | END_STREAM), late, frame(DATA, END_STREAM, 1, b"x")]


def lengths(rng: random.Random) -> list[bytes]:
    """A content-length that is not the body's, padding beyond the frame, a frame beyond the limit, messages cut."""
    wrong = opening(1, END_HEADERS, request(more=(("content-length", rng.choice(("3", "-1", "99", "x", "9" * 20))),)))
    body = rng.choice((
        frame(DATA, END_STREAM, 1, b"\0\0\0\0\x05abcde"), frame(DATA, PADDED | END_STREAM, 1, b"\xffabc"),
        frame(DATA, END_STREAM, 1, bytes(20_000)), frame(DATA, END_STREAM, 1, b"\0\0\0"), frame(DATA, 1, 0, b"x"),
        frame(DATA, END_STREAM, 1, b"\0\0\0\0\xffab"), frame(DATA, END_STREAM, 1, b"\x01\0\0\0\x02ab"),
    ))  # fmt: skip
    return [rng.choice((wrong, opening(1))), body]


def trailers(rng: random.Random) -> list[bytes]:
    last = rng.choice((
        fields([("x", "y")]), fields([("grpc-status", "0"), ("x-vivace-model", "response")]),
        fields([(":path", "/v2")]), fields([(f"t{n}", "v" * 50) for n in range(200)]), rng.randbytes(40),
    ))  # fmt: skip
    return [opening(1), frame(DATA, 0, 1, b"\0\0\0\0\x02ab"), frame(HEADERS, END_HEADERS | END_STREAM, 1, last)]


def floods(rng: random.Random) -> list[bytes]:
    count = rng.choice((100, 3000))
    one = rng.choice((
        frame(PING, 0, 0, bytes(8)), frame(SETTINGS, 0, 0), frame(PRIORITY, 0, 1, b"\0\0\0\x01\x10"),
        frame(WINDOW, 0, 0, b"\0\0\0\x01"), frame(DATA, 0, 1, b""), frame(99, 0, 0, b"unknown"),
        frame(RST, 0, 1, bytes(4)),
    ))  # fmt: skip
    continued = frame(HEADERS, 0, 3, fields(request()[:2])) + frame(CONTINUATION, 0, 3) * count
    return [opening(1), continued if rng.random() < 0.3 else one * count]


ODD_NAMES = ("Upper", "connection", "transfer-encoding", ":status", ":path", "a b", "")
ODD_PATHS = (
    "/",
    "",
    "*",
    "x",
    "/v2/logging",
    f"{INFER}/..",
    INFER.replace("ModelInfer", "RepositoryIndex"),
    f"{INFER}?x",
)


def odd_headers(rng: random.Random) -> list[bytes]:
    pairs = request()
    how = rng.randrange(8)
    if how == 0:
        pairs = pairs[rng.randrange(1, 4) :]
    elif how == 1:
        pairs.append(
            (rng.choice(("Upper", "connection", "transfer-encoding", ":status", ":path", "a b", "")), "chunked")
        )
    elif how == 2:
        pairs = request(rng.choice(ODD_PATHS))
    elif how == 3:
        pairs += [("x" * 40, "y" * 200)] * rng.choice((20, 70, 400))
    elif how == 4:
        pairs.append(("grpc-timeout", rng.choice(("0n", "1S", "99999999H", "x", "-1m", ""))))
    elif how == 5:
        pairs.append(("x", rng.choice(("a\r\nb", "a\x00", "\x80"))))
    block = fields(pairs) if how != 6 else rng.randbytes(80)
    return [frame(HEADERS, END_HEADERS, 1, block), frame(DATA, END_STREAM, 1, b"\0\0\0\0\0")]


def noise(rng: random.Random) -> list[bytes]:
    """Frames by chance."""
    return [
        frame(
            rng.randrange(12), rng.randrange(256), rng.choice((0, 1, 2, 3, 2**31 - 1)), rng.randbytes(rng.randrange(60))
        )
        for _ in range(rng.randrange(1, 12))
    ]


def _wire(parts: Callable[[random.Random], list[bytes]]) -> Callable[[random.Random], Wire]:
    def wire(rng: random.Random) -> Wire:
        last = frame(GOAWAY, 0, 0, bytes(8)) if rng.random() < 0.3 else b""
        return Wire([start(rng), *parts(rng), last], rng.choice(("read", "half", "gone")), rng.choice((0.0, 0.01)))

    return wire


KINDS: dict[str, Callable[[random.Random], Wire]] = {
    f"http2 {parts.__name__}": _wire(parts)
    for parts in (resets, streams, half_closed, lengths, trailers, floods, odd_headers, noise)
}
