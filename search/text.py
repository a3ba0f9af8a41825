"""Text to terms: one path for the catalogue when it is indexed and for a query when it is asked.

``normalise`` makes equal what people write in different ways (Unicode forms, case, width, units, sizes); ``terms``
cuts it by script: words of alphabets, by Snowball's English stems where they are plain Latin letters; numbers with
their unit; runs of Han, kana and Hangul as overlapping pairs of characters, which need no dictionary.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

import Stemmer

UNITS = {
    "oz": ("ounce", "ounces"), "lb": ("pound", "pounds", "lbs"), "kg": ("kilogram", "kilograms", "kilo", "kilos"),
    "g": ("gram", "grams"), "ml": ("milliliter", "milliliters", "millilitre", "millilitres"),
    "l": ("liter", "liters", "litre", "litres"), "in": ("inch", "inches"), "ft": ("foot", "feet"),
    "cm": ("centimeter", "centimeters", "centimetre", "centimetres"), "mm": ("millimeter", "millimeters"),
    "m": ("meter", "meters", "metre", "metres"), "gb": ("gigabyte", "gigabytes"), "tb": ("terabyte", "terabytes"),
    "mb": ("megabyte", "megabytes"), "w": ("watt", "watts"), "v": ("volt", "volts"), "mah": (), "pk": ("pack", "packs"),
    "ct": ("count",), "gal": ("gallon", "gallons"), "qt": ("quart", "quarts"), "hz": ("hertz",),
}  # fmt: skip
_UNIT = {spelling: unit for unit, spellings in UNITS.items() for spelling in (unit, *spellings)}
SIZES = {
    "extra small": "xs", "x-small": "xs", "extra large": "xl", "x-large": "xl", "xx-large": "xxl", "2xl": "xxl",
    "3xl": "xxxl", "xxx-large": "xxxl", "plus size": "plussize",
}  # fmt: skip

_NUMBER_UNIT = re.compile(
    r"(?<![\w.])(\d+(?:\.\d+)?)[\s-]*(" + "|".join(sorted(map(re.escape, _UNIT), key=len, reverse=True)) + r")(?!\w)"
)
_INCHES = re.compile(r"(?<=\d)\s*(?:\"|\u2033|'')")
_FEET = re.compile(r"(?<=\d)\s*'(?!\w)")
_SIZE = re.compile(r"(?<!\w)(" + "|".join(sorted(map(re.escape, SIZES), key=len, reverse=True)) + r")(?!\w)")
_HAN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0002fa1f"
_TERM = re.compile(rf"[{_HAN}]+|\d+(?:\.\d+)?[a-z]*|[^\W_{_HAN}]+(?:'[^\W\d_{_HAN}]+)?")
_IS_HAN = re.compile(rf"[{_HAN}]")
_PLAIN = re.compile(r"[a-z]+\Z")
_MARKS = ("Cc", "Cf", "Cs", "Co", "Cn")  # control, format (direction marks, joiners), surrogates, not assigned
STOP = frozenset(
    ("a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "in", "is", "it", "of", "on", "or", "that", "the",
     "this", "to", "with")
)  # fmt: skip

_stem = Stemmer.Stemmer("english")


def normalise(text: str) -> str:
    """``text`` in one spelling: Unicode's compatibility form without control and format characters, case folded,
    blanks single, "12 Ounces" as "12oz", "Extra Large" as "xl", letters without accents kept as they are."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(ch if unicodedata.category(ch) not in _MARKS else " " for ch in text)
    text = _FEET.sub("ft", _INCHES.sub("in", text.replace("\u2019", "'")))
    text = _NUMBER_UNIT.sub(lambda m: f"{m[1]}{_UNIT[m[2]]}", text)
    text = _SIZE.sub(lambda m: SIZES[m[1]], text)
    return " ".join(text.split())


def _bare(word: str) -> str:
    """Without accents: "café" as "cafe"; letters of other alphabets keep their marks."""
    split = unicodedata.normalize("NFD", word)
    return "".join(ch for ch in split if not unicodedata.combining(ch)) if split[:1].isascii() else word


def words(text: str) -> list[str]:
    """Words of a normalised text in their order, before stems: what typing errors are looked for in."""
    return [_bare(m[0]) for m in _TERM.finditer(text)]


@lru_cache(maxsize=1 << 16)
def term(word: str) -> tuple[str, ...]:
    """Terms of one word: its stem, or pairs of characters for scripts without blanks; () for words that say nothing."""
    if word in STOP:
        return ()
    if _IS_HAN.match(word):
        return tuple(word[i : i + 2] for i in range(len(word) - 1)) or (word,)
    word = word.removesuffix("'s").replace("'", "")
    return (str(_stem.stemWord(word)) if _PLAIN.match(word) else word,) if word else ()


def terms(text: str) -> list[str]:
    """Terms of raw text."""
    return [t for w in words(normalise(text)) for t in term(w)]
