"""The embedded synthetic shop: seeded, and with structure that a sequence model can learn and a counter cannot.

Categories hold items of unequal popularity; a user has tastes over categories and a price level, both of which drift
from session to session; a session keeps to a category and walks along "goes with" links between items; a purchase is
likelier where the price fits. What is wanted depends on the moment too: each category is worth more or less on each
device and at each time of the day, and dear items are worth less to users who mind prices (``SENSITIVITIES``, a column
of the table of users); ``log_appeal`` says by how much. Titles name brand, category and kind, so that answers can be
read. Before some views the user searched: with words of the item, its category or a word that its title does not have
(``OTHER_WORDS``); the results came in an order that knows nothing of the user, with the item somewhere among them, and
a place was looked at with chance 1 / position.

``ShopConfig.long_taste`` makes long logs whose users come back to what they liked long ago: each has a few items of
every category, ``LOVED``, that a share of the views of that category take, and the categories come round in the user's
own order. The last visit of a category, where what is loved there can be seen, lies about 320 events back, the one
before it 640, and so on: a model of the newest 200 events knows nothing of it. Items come again, so seen ones are not
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from preprocessing.readers.base import CHUNK_ROWS, Chunk
from vivace.contract import (
    CLICKED,
    EVENT,
    ITEM,
    POSITION,
    QUERY_TEXT,
    SEARCH,
    SOURCE_ROW,
    TIME,
    TITLE,
    USER,
    WEIGHT,
    DataSchema,
    TaskHead,
)
from vivace.manifest import digest

CATEGORIES = (
    *("kettle", "lamp", "chair", "desk", "rug", "mug", "towel", "pillow", "blanket", "clock", "mirror", "shelf"),
    *("basket", "candle", "vase", "tent", "backpack", "bottle", "stove", "boots", "jacket", "gloves", "scarf", "hat"),
    *("sunglasses", "watch", "headphones", "speaker", "keyboard", "mouse", "monitor", "charger", "camera", "tripod"),
    *("drone", "puzzle", "novel", "cookbook", "notebook", "pen"),
)
STYLES = (
    *("Oak", "Linen", "Copper", "Nordic", "Midnight", "Coral", "Alpine", "Urban"),
    *("Velvet", "Slate", "Amber", "Ivory", "Sage", "Cobalt", "Rustic", "Feather"),
)
BRANDS = ["Alto", "Brio", "Cadenza", "Dolce", "Forte", "Largo", "Mezzo", "Opus", "Presto", "Rondo", "Sonata", "Tempo"]
OTHER_WORDS = {
    "kettle": "boiler", "rug": "carpet", "mug": "cup", "jacket": "coat", "backpack": "rucksack", "hat": "cap",
    "notebook": "journal", "mirror": "glass",
}  # fmt: skip
DEVICES = ("phone", "desktop", "tablet")
DAY_PARTS = 4  # of six hours each, from midnight UTC
SENSITIVITIES = {"low": 0.0, "middle": 0.7, "high": 1.4}  # what a doubled price costs an item, as a logarithm
EVENTS, WEIGHTS = ("view", "cart", "buy"), np.array([1.0, 2.0, 3.0], np.float32)
OPTIONS = 6  # items of a category that a user looks at before one is chosen
START_MS = 1_735_689_600_000  # 2025-01-01
DAY_MS = 86_400_000
LOVED = 6  # items of each category that a user comes back to, with ``long_taste``
ROUND = 0.5  # chance that a session begins with the next category of the user's order in the place of the oldest
GENERATOR = 3  # counts what the same configuration generates otherwise than before


@dataclass(frozen=True)
class ShopConfig:
    """Size and seed. ``events`` is approximate (sessions have random lengths)."""

    users: int = 20_000
    items: int = 5_000
    events: int = 500_000
    days: int = 90
    seed: int = 7
    companions: int = 8  # items each item "goes with"
    follow: float = 0.55  # chance that the next view follows such a link
    searches: float = 0.04  # share of views that a search went before
    shown: int = 10  # results of a search
    moment: float = 0.9  # standard deviation of what a device or a part of the day does to a category's log appeal
    long_taste: float = 0.0  # share of the views that the taste of long ago decides (0: no such taste)

    def __post_init__(self) -> None:
        if not 0 <= self.long_taste < 1:
            raise ValueError(f"ShopConfig.long_taste: expected a share, 0 <= x < 1, got {self.long_taste}")
        if min(self.users, self.items, self.events, self.days) < 1 or self.items < len(CATEGORIES):
            raise ValueError(f"ShopConfig: expected positive sizes and at least {len(CATEGORIES)} items, got {self}")


class Rounds:
    """Each user's categories in an order of the user's own, four at a time: the oldest gives way to the next."""

    def __init__(self, config: ShopConfig, categories: int) -> None:
        self._rng = np.random.default_rng([config.seed, 5])
        self._order = self._rng.permuted(np.tile(np.arange(categories), (config.users, 1)), axis=1)
        self._next = np.arange(4)[None].repeat(config.users, 0)  # places in the order of the four
        self._oldest = np.zeros(config.users, np.int64)

    def move(self, taste: np.ndarray, live: np.ndarray) -> None:
        """Changes the tastes int64 [users, 4] for a session of the users ``live``, in place."""
        on = live[self._rng.random(len(live)) < ROUND]
        self._next[on, self._oldest[on] % 4] += 4
        self._oldest[on] += 1
        places = self._next[live] % self._order.shape[1]
        taste[live] = np.take_along_axis(self._order[live], places, 1)


class Shop:
    """``Source`` of the synthetic shop."""

    schema = DataSchema(
        name="shop",
        event_categoricals=(EVENT, "device", "price_sensitivity"),
        user_columns=("price_sensitivity",),
        time_zone="UTC",
        item_categoricals=("category", "brand"),
        item_continuous=("price",),
        heads=(TaskHead("click", float("-inf")), TaskHead("buy", 3.0)),
        licence="generated; free to use",
    )

    def __init__(self, config: ShopConfig | None = None) -> None:
        self.config = config or ShopConfig()
        config, rng = self.config, np.random.default_rng((config or ShopConfig()).seed)
        n = len(CATEGORIES)
        self._category = np.sort(np.concatenate([np.arange(n), rng.integers(0, n, config.items - n)]))
        self._appeal = rng.zipf(1.6, config.items).clip(1, 400).astype(float)  # popularity skew
        level = rng.normal(3.5, 0.8, n)
        self._log_price = (level[self._category] + rng.normal(0, 0.5, config.items)).astype(np.float32)
        self._brand = rng.integers(0, len(BRANDS), config.items)
        self._style = rng.integers(0, len(STYLES), config.items)
        self._start = np.searchsorted(self._category, np.arange(n + 1))
        self._near = rng.permuted(np.tile(np.arange(n), (n, 1)), axis=1)[:, :4]  # categories bought together
        moments = np.random.default_rng([config.seed, 3])
        self._of_device = moments.normal(0, config.moment, (len(DEVICES), n))
        self._of_day_part = moments.normal(0, config.moment, (DAY_PARTS, n))
        self._dearness = (self._log_price - level[self._category]) / np.log(2)  # doublings of the category's price
        self._sensitivity = moments.integers(0, len(SENSITIVITIES), config.users)
        if config.long_taste:
            self.schema = replace(self.schema, exclude_seen=False)
        # companions: mostly of the same or a near category, fixed for the whole log
        same_category = rng.random((config.items, config.companions)) < 0.6
        near = self._near[self._category[:, None], rng.integers(0, 4, same_category.shape)]
        self._companion = self._draw(rng, np.where(same_category, self._category[:, None], near))
        self._loved = self._long_ago() if config.long_taste else None

    def _long_ago(self) -> np.ndarray:
        """Items that each user comes back to, by category, int64 [users, categories, LOVED]; any of a category, not its
        popular ones."""
        place = np.random.default_rng([self.config.seed, 4]).random((self.config.users, len(CATEGORIES), LOVED))
        of_category = np.diff(self._start)[None, :, None]
        loved: np.ndarray = self._start[None, :-1, None] + (place * of_category).astype(np.int64)
        return loved

    def _draw(self, rng: np.random.Generator, category: np.ndarray) -> np.ndarray:
        """Items of the given categories by appeal (inverse CDF within each category)."""
        cdf = np.cumsum(self._appeal)
        low = np.concatenate([[0.0], cdf])[self._start[category]]
        high = np.concatenate([[0.0], cdf])[self._start[category + 1]]
        return np.minimum(np.searchsorted(cdf, low + rng.random(category.shape) * (high - low), "right"), len(cdf) - 1)

    def log_appeal(self, device: np.ndarray, day_part: np.ndarray, sensitivity: np.ndarray) -> np.ndarray:
        """What the moment adds to the logarithm of each item's chance, float64 [B, items]: of numbers of DEVICES, of
        parts of the day and of SENSITIVITIES, int64 [B] each."""
        of_category = self._of_device[device] + self._of_day_part[day_part]
        cost = np.array(list(SENSITIVITIES.values()))[sensitivity]
        appeal: np.ndarray = of_category[:, self._category] - cost[:, None] * self._dearness
        return appeal

    def _tastes(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(four favoured categories int64 [users, 4], log price that suits, float64 [users]) when the log begins."""
        taste = rng.integers(0, len(CATEGORIES), (self.config.users, 4))
        return taste, rng.normal(3.5, 0.7, self.config.users)

    def wanted(self, user: np.ndarray, device: np.ndarray, day_part: np.ndarray) -> np.ndarray:
        """Logarithm of the chance that a session at the log's beginning begins with each item, float64 [B, items]; -inf
        outside of the user's favoured categories. Of numbers of users, of DEVICES and of parts of the day, int64 [B].
        The choice among OPTIONS drawn items is taken as one among all of the category. Raises ValueError for a shop
        with ``long_taste``."""
        if self.config.long_taste:
            raise ValueError(f"Shop.wanted: expected a shop without long_taste, got {self.config.long_taste}")
        taste = self._tastes(np.random.default_rng([self.config.seed, 1]))[0][user]
        leaning = (self._of_device[device] + self._of_day_part[day_part])[np.arange(len(user))[:, None], taste]
        of_category = np.zeros((len(user), len(CATEGORIES)))
        chance = np.exp(leaning - leaning.max(1, keepdims=True))
        np.add.at(of_category, (np.arange(len(user))[:, None], taste), chance / chance.sum(1, keepdims=True))
        cost = np.array(list(SENSITIVITIES.values()))[self._sensitivity[user]]
        strength = self._appeal * np.exp(-cost[:, None] * self._dearness)
        whole = np.add.reduceat(strength, self._start[:-1], axis=1)
        with np.errstate(divide="ignore"):
            log_chance: np.ndarray = np.log(strength * (of_category / whole)[:, self._category])
        return log_chance

    def users(self) -> list[Chunk]:
        words = np.array(list(SENSITIVITIES), object)[self._sensitivity]
        names = [f"user-{u:05d}" for u in range(self.config.users)]
        rows = {USER: names, "price_sensitivity": words, SOURCE_ROW: np.arange(len(names))}
        return [Chunk(pd.DataFrame(rows))]

    def fingerprint(self) -> str:
        config = asdict(self.config)
        if not self.config.long_taste:  # a later field: shops without it are what they were
            del config["long_taste"]
        return digest(config | {"generator": GENERATOR})

    def _ids(self) -> np.ndarray:
        return np.array([f"sku-{i:05d}" for i in range(self.config.items)], object)

    def items(self) -> pd.DataFrame:
        titles = [
            f"{BRANDS[b]} {STYLES[s]} {CATEGORIES[k]} {i % 97 + 3}"
            for i, (b, s, k) in enumerate(zip(self._brand, self._style, self._category, strict=True))
        ]
        return pd.DataFrame(
            {
                ITEM: self._ids(),
                TITLE: titles,
                "category": np.array(CATEGORIES, object)[self._category],
                "brand": np.array(BRANDS, object)[self._brand],
                "price": np.exp(self._log_price).round(2),
            }
        )

    def _log(self) -> pd.DataFrame:
        config = self.config
        rng = np.random.default_rng([config.seed, 1])
        n, users = len(CATEGORIES), np.arange(config.users)
        taste, budget = self._tastes(rng)
        activity = rng.lognormal(0, 0.6, config.users)
        share = activity / activity.sum() * config.events / 3.9  # new items a session, on average
        sessions = np.maximum(rng.poisson(share), 1)
        clock = START_MS + rng.integers(0, config.days * DAY_MS // 3, config.users)
        gap = (config.days * DAY_MS * 2 // 3) / np.maximum(sessions, 1)
        parts = []
        rounds = Rounds(config, n) if config.long_taste else None
        for s in range(int(sessions.max())):
            live = users[sessions > s]
            if rounds is None:
                drift = live[rng.random(len(live)) < 0.15]
                taste[drift, rng.integers(0, 4, len(drift))] = rng.integers(0, n, len(drift))
            else:
                rounds.move(taste, live)
            budget[live] += rng.normal(0, 0.05, len(live))
            clock[live] += (rng.exponential(1.0, len(live)) * gap[live]).astype("int64") + 1
            parts.append(self._session(rng, live, taste, budget, clock))
        frame = pd.concat(parts).sort_values([TIME, USER], kind="stable")
        if not config.long_taste:
            frame = frame.drop_duplicates([USER, ITEM], keep="first")
        frame = frame.reset_index(drop=True)
        frame[USER] = np.array([f"user-{u:05d}" for u in range(config.users)], object)[frame[USER]]
        frame[ITEM] = self._ids()[frame[ITEM]]
        frame[SOURCE_ROW] = np.arange(len(frame))
        return frame

    def _session(
        self,
        rng: np.random.Generator,
        live: np.ndarray,
        taste: np.ndarray,
        budget: np.ndarray,
        clock: np.ndarray,
    ) -> pd.DataFrame:
        """One session of every user in ``live``, step by step over all of them at once."""
        device, every = rng.choice(3, len(live), p=(0.6, 0.3, 0.1)), np.arange(len(live))
        day_part = clock[live] % DAY_MS * DAY_PARTS // DAY_MS
        of_category = self._of_device[device] + self._of_day_part[day_part]  # [B, categories]
        cost = np.array(list(SENSITIVITIES.values()))[self._sensitivity[live]]

        def drawn(category: np.ndarray) -> np.ndarray:
            """Items of the categories, by appeal and the user's sense of prices."""
            options = np.stack([self._draw(rng, category) for _ in range(OPTIONS)], 1)
            fit = -cost[:, None] * self._dearness[options] + rng.gumbel(0, 1, options.shape)
            return options[every, fit.argmax(1)]

        leaning = of_category[every[:, None], taste[live]] + rng.gumbel(0, 1, (len(live), 4))
        focus = taste[live, leaning.argmax(1)]
        length = rng.geometric(0.2, len(live)).clip(1, 15)
        item = self._loved_or(drawn(focus), rng, live, focus)
        now = clock[live].copy()
        steps = []
        for step in range(int(length.max())):
            on = length > step
            if step:
                follow = rng.random(len(live)) < self.config.follow
                # of the companions, users prefer those near their price level
                options = self._companion[item]
                fit = -((self._log_price[options] - budget[live, None]) ** 2) + rng.gumbel(0, 0.5, options.shape)
                fit += of_category[every[:, None], self._category[options]] - cost[:, None] * self._dearness[options]
                item = np.where(follow, options[every, fit.argmax(1)], drawn(focus))
                item = self._loved_or(item, rng, live, focus)
                now = now + (rng.exponential(45_000, len(live))).astype("int64") + 1000
            match = np.exp(-((self._log_price[item] - budget[live]) ** 2))
            u = rng.random(len(live))
            kind = np.where(u < 0.15 * match, 2, np.where(u < 0.35 * match, 1, 0))
            names = np.array(DEVICES, object)[device]
            frame = pd.DataFrame({USER: live, ITEM: item, TIME: now, "kind": kind, "device": names})
            steps.append(frame[on])
        out = pd.concat(steps)
        out[EVENT] = np.array(EVENTS, object)[out["kind"]]
        out[WEIGHT] = WEIGHTS[out["kind"]]
        return out.drop(columns="kind")

    def _loved_or(self, item: np.ndarray, rng: np.random.Generator, live: np.ndarray, focus: np.ndarray) -> np.ndarray:
        """The items, int64 [B], of a share of the users one that they loved long ago in the session's category."""
        if self._loved is None:
            return item
        again = rng.random(len(live)) < self.config.long_taste
        return np.where(again, self._loved[live, focus, rng.integers(0, LOVED, len(live))], item)

    def interactions(self) -> Iterator[Chunk]:
        log = self._log()
        log[TIME] = log[TIME].astype(float)
        for start in range(0, len(log), CHUNK_ROWS):
            yield Chunk(log.iloc[start : start + CHUNK_ROWS].reset_index(drop=True))

    def searches(self) -> Iterator[Chunk]:
        """Before a view, 30 s earlier: what the user looked for, among items of the same category, brand first."""
        config, rng = self.config, np.random.default_rng([self.config.seed, 2])
        log = self._log()
        chosen = log.iloc[np.sort(rng.choice(len(log), round(len(log) * config.searches), replace=False))]
        number = chosen[ITEM].str[4:].astype(int).to_numpy()
        rows: dict[str, list[np.ndarray]] = {name: [] for name in (ITEM, POSITION, CLICKED)}
        queries = []
        for item in number:
            kind = CATEGORIES[self._category[item]]
            word = OTHER_WORDS[kind] if kind in OTHER_WORDS and rng.random() < 0.3 else kind
            before = (STYLES[self._style[item]], BRANDS[self._brand[item]], "")[rng.choice(3, p=(0.4, 0.4, 0.2))]
            queries.append(f"{before} {word}".strip().lower())
            alike = np.arange(*self._start[self._category[item] : self._category[item] + 2])
            match = (self._brand[alike] == self._brand[item]) | (self._style[alike] == self._style[item])
            score = np.log(self._appeal[alike]) + 3 * match + rng.gumbel(0, 1, len(alike))
            shown = alike[np.argsort(-score)[: config.shown]]
            if item not in shown:  # else nothing would be learned of what no one is shown
                shown[rng.integers(len(shown))] = item
            place = np.arange(1, len(shown) + 1)
            click_chance = np.where(shown == item, 0.9, 0.1)
            rows[ITEM].append(shown)
            rows[POSITION].append(place)
            rows[CLICKED].append(rng.random(len(shown)) < click_chance / place)
        lengths = [len(v) for v in rows[ITEM]]
        frame = pd.DataFrame({name: np.concatenate(values) for name, values in rows.items()})
        frame[ITEM] = self._ids()[frame[ITEM]]
        frame[SEARCH] = np.repeat([f"search-{i:06d}" for i in range(len(chosen))], lengths)
        frame[QUERY_TEXT] = np.repeat(np.array(queries, object), lengths)
        frame[USER] = np.repeat(chosen[USER].to_numpy(object), lengths)
        frame[TIME] = np.repeat(chosen[TIME].to_numpy(float) - 30_000, lengths)
        frame[SOURCE_ROW] = np.arange(len(frame))
        yield Chunk(frame)
