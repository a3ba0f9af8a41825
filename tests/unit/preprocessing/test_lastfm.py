"""Last.fm in the files of HetRec 2011, in a small copy of their layout."""

from __future__ import annotations

import numpy as np
import pytest

from preprocessing.readers import open_source
from vivace import contract

ARTISTS = 'id\tname\turl\tpictureURL\n1\tMALICE MIZER\tu\tp\n2\tDiary of "Dreams\tu\tp\n3\tCarpathian\tu\tp\n'
TAGS = "tagID\ttagValue\r\n1\tmetal\r\n2\tgoth rock\r\n3\ttropic\xe1lia\r\n"
PLAYS = "userID\tartistID\tweight\n7\t1\t400\n7\t2\t30\n8\t3\t5\n8\t1\t9\n8\t2\t2\n"
TAGGED = (
    "userID\tartistID\ttagID\tday\tmonth\tyear\n"
    "7\t1\t1\t1\t4\t2009\n"  # two tags of one day are one event
    "7\t1\t2\t1\t4\t2009\n"
    "7\t9\t1\t1\t5\t2009\n"  # an artist that is not listed
    "7\t1\t3\t1\t6\t2009\n"  # the same artist again: a listener's newest event
    "8\t2\t2\t1\t1\t1956\n"
    "8\t2\t2\t1\t1\t2010\n"
    "8\t1\t2\t1\t2\t2010\n"
    "8\t3\t1\t1\t3\t2010\n"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "artists.dat").write_text(ARTISTS, encoding="utf-8")
    (tmp_path / "tags.dat").write_bytes(TAGS.encode("cp1252"))
    (tmp_path / "user_artists.dat").write_text(PLAYS)
    (tmp_path / "user_taggedartists.dat").write_text(TAGGED)
    return tmp_path


def test_an_event_is_a_listener_an_artist_and_a_day_and_its_weight_the_play_count(folder):
    (chunk,) = open_source("lastfm", folder).interactions()
    rows = chunk.rows.set_index([contract.USER, contract.TIME])
    assert len(rows) == 7
    april, june = (np.datetime64(day, "ms").astype(float) for day in ("2009-04-01", "2009-06-01"))
    assert rows.loc[("7", april), contract.WEIGHT] == 400.0
    assert rows.loc[("7", june), contract.ITEM] == "1"  # again: of another day
    assert np.isnan(rows.loc["7"].set_index(contract.ITEM).loc["9", contract.WEIGHT])
    assert np.isneginf(chunk.rows[contract.TIME]).sum() == 1  # 1956: rejected, and counted so
    assert chunk.rows[contract.SOURCE_ROW].is_monotonic_increasing


def test_no_tag_of_a_held_out_event_describes_its_artist(folder):
    items = open_source("lastfm", folder).items().set_index(contract.ITEM)
    assert items["tags"].to_dict() == {"1": "goth rock|metal", "2": "goth rock", "3": ""}  # not tropicália, not metal
    assert items.loc["2", contract.TITLE] == 'Diary of "Dreams'
    assert items.loc["1", contract.TEXT].split() == ["MALICE", "MIZER", "goth", "rock", "metal"]


def test_events_of_one_day_are_not_in_the_order_of_the_artists(folder):
    many = "".join(f"5\t{artist}\t1\t1\t1\t2010\n" for artist in range(1, 200))
    (folder / "user_taggedartists.dat").write_text(TAGGED.splitlines()[0] + "\n" + many)
    source = open_source("lastfm", folder)
    orders = [next(source.interactions()).rows[contract.ITEM].astype(int).tolist() for _ in range(2)]
    assert orders[0] == orders[1] and abs(np.corrcoef(orders[0], range(199))[0, 1]) < 0.3


def test_plays_are_one_event_a_pair_in_a_seeded_order(folder):
    source = open_source("lastfm-plays", folder)
    (chunk,) = source.interactions()
    assert source.schema.exclude_seen and not open_source("lastfm", folder).schema.exclude_seen
    weights = chunk.rows.set_index([contract.USER, contract.ITEM])[contract.WEIGHT]
    assert weights[("7", "1")] == 400.0 and len(weights) == 5
    assert chunk.rows.groupby(contract.USER)[contract.TIME].max().to_dict() == {"7": 1.0, "8": 2.0}
    tags = source.items().set_index(contract.ITEM)["tags"]
    assert "tropicália" not in tags["1"]  # said by listener 7 alone, whose two events are the held-out ones
