"""Which values an option takes: read from the module that owns them, checked while the command line is parsed.

The module is read, not imported: PyTorch and its friends take seconds, and neither a page of help nor the refusal of a
typing error should wait for them.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from vivace.manifest import CHECKOUT
from vivace.strict_json import strict_json


@functools.cache
def _definitions(module: str) -> dict[str, ast.expr]:
    """What a module assigns to its names; of a class's fields, as "Class.field", their annotations."""
    path = CHECKOUT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            names[node.target.id] = node.value
        elif isinstance(node, ast.ClassDef):
            fields = (f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name))
            names |= {f"{node.name}.{ast.unparse(f.target)}": f.annotation for f in fields}
    return names


def _texts(node: ast.expr, names: dict[str, ast.expr]) -> tuple[str, ...]:
    """Texts of a tuple, of a dictionary's keys, of a Literal, or of a name for one of them."""
    match node:
        case ast.Constant(value=str(text)):
            return (text,)
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            return tuple(text for part in parts for text in _texts(part, names))
        case ast.Dict(keys=keys):
            return tuple(text for key in keys if key is not None for text in _texts(key, names))
        case ast.Subscript(slice=inner) | ast.Starred(value=inner) | ast.Call(args=[inner]):
            return _texts(inner, names)
        case ast.Name(id=name) if name in names:
            return _texts(names[name], names)
    raise ValueError(f"expected texts that can be read without running them, got {ast.unparse(node)}")


def values_of(owner: str) -> tuple[str, ...]:
    """The values that ``owner`` names, such as "training.presets:PRESETS": a tuple, the keys of a dictionary, or a
    Literal, also as the annotation of a field ("training.presets:RetrievalTraining.loss")."""
    module, _, name = owner.partition(":")
    definitions = _definitions(module)
    if name not in definitions:
        raise LookupError(f"{owner}: expected a name of that module, which has {sorted(definitions)}")
    return _texts(definitions[name], definitions)


def refusal(text: str, allowed: Iterable[str], also: str = "") -> typer.BadParameter:
    """The error of a value that is not one of ``allowed``; it names those, and the nearest first."""
    names = list(allowed)
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return typer.BadParameter(f"expected one of {', '.join(names)}{also}, got {text!r}{hint}")


def one_of(allowed: tuple[str, ...], commas: bool = False, also_json: bool = False) -> Callable[[str], str]:
    """Checks a value; "" stands for the default and always is one. ``commas``: several by commas. ``also_json``: the
    path of a JSON file too."""

    def check(text: str) -> str:
        for part in text.split(",") if commas else [text]:
            if part and part not in allowed and not (also_json and part.endswith(".json")):
                raise refusal(part, allowed, " or the path of a .json file" if also_json else "")
        return text

    return check


def choice(flag: str, allowed: tuple[str, ...], help: str, **how: bool) -> Any:
    """An option of few values; help names them. ``how``: see ``one_of``."""
    shown = f"{help}: {', '.join(allowed)}" + (" or a JSON file" if how.get("also_json") else "")
    return typer.Option(flag, help=shown, parser=one_of(allowed, **how), metavar="NAME")


RUN = re.compile(r"[^/\\.\0-][^/\\\0]*")
VARIANT = re.compile(rf"{RUN.pattern}(/compressed/{RUN.pattern})?")


def plain_name(text: str) -> str:
    """A name that becomes one folder or file. "" stands for the default."""
    if text and not RUN.fullmatch(text):
        raise typer.BadParameter(f"expected a name without slashes that starts with no dot or dash, got {text!r}")
    return text


def a_name(text: str) -> str:
    """The same where there is no default to stand for."""
    if not text:
        raise typer.BadParameter("expected a name, got an empty text")
    return plain_name(text)


def run_name(text: str) -> str:
    """The name of a run or of a compressed variant. "" stands for the default."""
    if text and not VARIANT.fullmatch(text):
        raise typer.BadParameter(
            f"expected the name of a run such as shop, or of a variant such as shop/compressed/small, got {text!r}; "
            "--artifacts is where the folder lies"
        )
    return text


SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> str:
    """Seconds, as text, of a time such as 90s, 30m, 1h or 1d. "" stands for none."""
    if text and not re.fullmatch(r"[1-9][0-9]*[smhd]", text):
        raise typer.BadParameter(f"expected a time such as 90s, 30m, 1h or 1d, got {text!r}")
    return str(int(text[:-1]) * SECONDS[text[-1]]) if text else text


def percentages(text: str) -> tuple[float, ...]:
    """Shares of numbers in per cent below 100, each no smaller than the one before and the last above 0, by commas:
    "1,5%,25"."""
    try:
        numbers = tuple(float(part.strip().removesuffix("%")) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 <= n < 100 for n in numbers) or list(numbers) != sorted(numbers) or not numbers[-1]:
        raise typer.BadParameter(
            f"expected per cent below 100, no step smaller than the last, the last above 0, got {text!r}; the others "
            "are what it is compared with, and 'vivace rollout promote' serves it to everyone"
        )
    return tuple(n / 100 for n in numbers)


def percent(text: str) -> float:
    """The share of a number in per cent, from 0: "2%" or "2"."""
    try:
        number = float(str(text).strip().removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise typer.BadParameter(f"expected per cent such as 2%, got {text!r}")
    return number / 100


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object written on the command line; None for ""."""
    if isinstance(text, dict) or not text:
        return text or None
    try:
        value = strict_json(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}; got {text!r}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object in braces, got {text!r}")
    return value


def json_file(path: Path, flag: str) -> dict[str, Any]:
    """The JSON object in a file that ``flag`` names. Raises BadParameter."""
    try:
        value = strict_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=flag) from None
    except ValueError as error:
        raise typer.BadParameter(f"{path}: not JSON: {error}", param_hint=flag) from None
    if not isinstance(value, dict):
        raise typer.BadParameter(
            f"{path}: expected a JSON object in braces, got {type(value).__name__}", param_hint=flag
        )
    return value
