"""Mappings that can be read and mean nothing: refused with what came and what to do."""

from __future__ import annotations

import pytest

from preprocessing.prepare import PrepareConfig, prepare
from preprocessing.readers.tables import Tables
from tests.unit.preprocessing.tables import HEAD, read, write

MOST = r"heads: expected numbers from -1e\+15 to 1e\+15, got"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("nan", MOST), ("-inf", MOST), ("1e30", MOST), ("true", MOST), (f"1{'0' * 400}", MOST),
        (f"1{'0' * 5000}", "not TOML: .*digits"), ("0\nclick = 1", "not TOML: .*overwrite"),
        ("[" * 100_000, "not TOML: .*recursion"),
    ],
    ids=("nan", "inf", "float", "bool", "int", "digits", "twice", "nested"),
)  # fmt: skip
def test_a_number_of_a_mapping_is_one(tmp_path, number, message):
    write(tmp_path, "mapping.toml", HEAD.format(events="e.csv") + f"[heads]\nclick = {number}\n")
    with pytest.raises(ValueError, match=message):
        Tables(tmp_path / "mapping.toml")


def test_a_log_of_what_was_only_shown_is_refused_with_the_types_that_came(tmp_path):
    kinds = ["seen", "seen", "seen", "below", "seen", "below"]
    events = "user,item,ts,act\n" + "".join(f"u,A,{1_700_000_000 + n},{kind}\n" for n, kind in enumerate(kinds))
    read(tmp_path, events, keys='event_type = "act"\nshown_types = ["seen", "below", "past"]\n')
    came = (
        r"of 6 rows only .*: 'seen' \(4\), 'below' \(2\); it names \['seen', 'below', 'past'\]\. .*out of shown_types"
    )
    with pytest.raises(ValueError, match=came):
        prepare(Tables(tmp_path / "mapping.toml"), PrepareConfig(partitions=1), tmp_path / "out", 0, lambda _: None)
