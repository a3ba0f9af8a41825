"""Last.fm listeners, in the files of HetRec 2011 (Cantador, Brusilovsky & Kuflik): play counts, dated tags, friends.

Licence: non-commercial use (Last.fm's terms); obtain it from GroupLens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.readers.base import CHUNK_ROWS, Chunk, require
from vivace.contract import EVENT, ITEM, SEPARATOR, SOURCE_ROW, TEXT, TIME, TITLE, USER, WEIGHT, DataSchema, TaskHead
from vivace.manifest import fingerprint_files

LICENCE = "Last.fm (HetRec 2011): non-commercial use"
FILES = ("artists.dat", "tags.dat", "user_artists.dat", "user_taggedartists.dat")
FRIENDS_FILE = "user_friends.dat"
OFTEN = 260.0  # plays of an artist by one listener: the median of the file
HELD_OUT = 2  # newest events of a listener, which leave-one-out holds out
SEED = 7  # of the order of what has none


def _read(path: Path, encoding: str = "utf-8") -> pd.DataFrame:
    """Tab-separated fields as text; a quote is a character like any other."""
    return pd.read_csv(path, sep="\t", dtype=str, quoting=3, encoding=encoding, keep_default_na=False)


class LastFm:
    """An event is a listener's tagging of an artist on a day: ``user_taggedartists.dat``, one row however many tags.

    Times are days. Events of one day are put into a random order, seeded: the file has them by the number of the
    artist, so that its order would give the last one away. The weight is the listener's play count of the artist, null
    where ``user_artists.dat``, which has the 50 most played, does not list it. Plays have no time, so those of artists
    that the listener never tagged are no events here; ``LastFmPlays`` has them. Artists are tagged again (a fifth of
    the held-out events), so items of the history may be answered.

    An artist's tags are its attribute (a list) and its text. Tags of each listener's two newest events are left out of
    both, as they would name the answer of leave-one-out.
    """

    schema = DataSchema(
        name="lastfm",
        item_lists=("tags",),
        heads=(TaskHead("tagged", float("-inf")), TaskHead("often", OFTEN)),
        unknown_items="keep",
        exclude_seen=False,
        licence=LICENCE,
    )

    def __init__(self, path: Path) -> None:
        require(path, FILES, "Last.fm (HetRec 2011)")
        self.path = path

    def fingerprint(self) -> str:
        return fingerprint_files(self.path / f for f in FILES)

    def _plays(self) -> pd.DataFrame:
        return _read(self.path / "user_artists.dat").set_axis([USER, ITEM, WEIGHT], axis=1)

    def _tagged(self) -> pd.DataFrame:
        """Each assignment: USER, ITEM, "tag" in words, TIME in ms."""
        frame = _read(self.path / "user_taggedartists.dat").rename(columns={"userID": USER, "artistID": ITEM})
        day = pd.to_datetime(frame[["year", "month", "day"]].apply(pd.to_numeric, errors="coerce"), errors="coerce")
        time_ms = (day - pd.Timestamp(0)) / pd.Timedelta(milliseconds=1)
        words = _read(self.path / "tags.dat", "cp1252").set_index("tagID")["tagValue"]
        tag = frame["tagID"].map(words).str.strip().str.replace(SEPARATOR, " ", regex=False)
        time_ms = time_ms.mask(time_ms < 0, -np.inf)  # three rows of 1956 and 1957
        return pd.DataFrame({USER: frame[USER], ITEM: frame[ITEM], "tag": tag, TIME: time_ms})

    def _log(self) -> pd.DataFrame:
        """USER, ITEM, TIME and WEIGHT of each event; of each listener the newest last."""
        events = self._tagged()[[USER, ITEM, TIME]].drop_duplicates()
        events = events.merge(self._plays(), on=[USER, ITEM], how="left")
        return _shuffled(events).sort_values([USER, TIME], kind="stable")

    def items(self) -> pd.DataFrame:
        artists = _read(self.path / "artists.dat")
        newest = self._log().groupby(USER).tail(HELD_OUT)
        assigned = self._tagged().merge(newest[self._answer], on=self._answer, how="left", indicator=True)
        given = assigned[(assigned["_merge"] == "left_only") & assigned["tag"].notna()]
        by_artist = given.groupby(ITEM)["tag"]
        ordered = by_artist.value_counts().rename("times").reset_index()  # what most listeners say comes first
        words = ordered.groupby(ITEM, sort=False)["tag"].agg(" ".join)
        lists = by_artist.agg(lambda tags: SEPARATOR.join(sorted(set(tags))))
        name = artists["name"].str.strip()
        return pd.DataFrame(
            {
                ITEM: artists["id"],
                TITLE: name,
                TEXT: name.str.cat(artists["id"].map(words).fillna(""), sep=" ").str.strip(),
                "tags": artists["id"].map(lists).fillna(""),
            }
        )

    _answer = [USER, ITEM, TIME]
    _event = "tag"

    def interactions(self) -> Iterator[Chunk]:
        frame = self._log()
        frame[WEIGHT] = pd.to_numeric(frame[WEIGHT])
        frame[EVENT], frame[SOURCE_ROW] = self._event, np.arange(len(frame))
        for start in range(0, len(frame), CHUNK_ROWS):
            yield Chunk(frame.iloc[start : start + CHUNK_ROWS].reset_index(drop=True))


class LastFmPlays(LastFm):
    """An event is a pair of listener and artist of ``user_artists.dat`` (the 50 most played), its weight the count.

    Plays have no time and each pair is there once: the order is random, seeded, so leave-one-out holds out two artists
    of each listener by chance. Time is the position. Items of the history are not answered.
    """

    schema = DataSchema(
        name="lastfm-plays",
        item_lists=("tags",),
        heads=(TaskHead("played", float("-inf")), TaskHead("often", OFTEN)),
        licence=LICENCE,
    )
    _answer = [USER, ITEM]
    _event = "play"

    def _log(self) -> pd.DataFrame:
        events = _shuffled(self._plays()).sort_values(USER, kind="stable")
        events[TIME] = events.groupby(USER).cumcount().astype(float)
        return events


class LastFmFriends(LastFm):
    """Friendships of ``user_friends.dat``: users are the items, described by the artists that they play.

    They have no time, so each friendship gets a random one, seeded, the same in both directions: with ``--split time``
    both are held out together, and neither gives the other away. Each user's first event is the user: so a list holds
    its owner, and who is in a friend's list counts as near.
    """

    schema = DataSchema(
        name="lastfm-friends",
        event_continuous=(),
        item_lists=("artists",),
        heads=(TaskHead("friend", float("-inf")),),
        licence=LICENCE,
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        require(path, (FRIENDS_FILE,), "Last.fm (HetRec 2011)")

    def fingerprint(self) -> str:
        return fingerprint_files(self.path / f for f in (*FILES, FRIENDS_FILE))

    def items(self) -> pd.DataFrame:
        names = _read(self.path / "artists.dat").set_index("id")["name"].str.replace(SEPARATOR, " ", regex=False)
        plays = self._plays()
        of_user = plays.assign(name=plays[ITEM].map(names)).groupby(USER)["name"]
        artists = of_user.agg(SEPARATOR.join)
        title = "listener " + artists.index
        return pd.DataFrame({ITEM: artists.index, TITLE: title, "artists": artists.to_numpy()})

    def interactions(self) -> Iterator[Chunk]:
        pairs = _read(self.path / FRIENDS_FILE).set_axis([USER, ITEM], axis=1)
        number = pairs.astype(int)
        both = pd.Series(list(zip(number.min(axis=1), number.max(axis=1), strict=True)))
        edges = pd.factorize(both, sort=True)[0]
        order = np.random.default_rng(SEED).permutation(edges.max() + 1)
        pairs[TIME] = order[edges] + 1.0
        users = pairs[USER].unique()
        owner = pd.DataFrame({USER: users, ITEM: users, TIME: 0.0})
        frame = pd.concat([owner, pairs], ignore_index=True)
        frame[EVENT], frame[SOURCE_ROW] = "friend", np.arange(len(frame))
        yield Chunk(frame)


def _shuffled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.iloc[np.random.default_rng(SEED).permutation(len(frame))]
