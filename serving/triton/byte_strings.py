"""BYTES tensors between Triton's Python stub and numpy, faster than ``triton_python_backend_utils`` does it.

A patch of that module, and the only one: the stub looks both functions up in it at each call and offers no other way.
Its own unpack one element a call with a format made for it; a history of 200 items costs several times as much. It can
go when Triton's own are about as fast (they were not in 2.51). ``install`` is called by ``serving.triton.stage``.
"""

from __future__ import annotations

import struct

import numpy as np

_LENGTH, _PACK = struct.Struct("<I").unpack_from, struct.Struct("<I").pack


def read_strings(encoded: np.ndarray | bytes) -> np.ndarray:
    """Elements of a serialized BYTES tensor, object [n]."""
    buffer = bytes(encoded)
    values, offset, end = [], 0, len(buffer)
    while offset < end:
        start = offset + 4
        offset = start + _LENGTH(buffer, offset)[0]
        values.append(buffer[start:offset])
    out = np.empty(len(values), object)
    out[:] = values
    return out


def write_strings(array: np.ndarray) -> bytes | tuple[()]:
    """The reverse for an object array of bytes; () for an empty one, as Triton's own gives."""
    return b"".join([part for value in array.ravel().tolist() for part in (_PACK(len(value)), value)]) or ()


def install() -> None:
    """From here on the stub uses these. Only inside Triton's Python stub."""
    import triton_python_backend_utils as pb_utils

    pb_utils.deserialize_bytes_tensor = read_strings
    pb_utils.serialize_byte_tensor = write_strings
