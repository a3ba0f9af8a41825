"""BYTES tensors as Triton has them: each element behind its length, four bytes, little end first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from serving.triton.byte_strings import read_strings, write_strings


def test_by_hand():
    written = write_strings(np.array([[b"ab", b""], [b"\xff", b"c"]], object))
    assert written == b"\x02\0\0\0ab\0\0\0\0\x01\0\0\0\xff\x01\0\0\0c"
    assert read_strings(np.frombuffer(written, np.uint8)).tolist() == [b"ab", b"", b"\xff", b"c"]
    assert write_strings(np.empty((1, 0), object)) == ()  # as Triton's own


@given(st.lists(st.binary(max_size=300), min_size=1))
def test_what_is_written_is_read_back(values):
    array = np.empty(len(values), object)
    array[:] = values
    assert read_strings(write_strings(array)).tolist() == values
