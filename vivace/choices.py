"""Few allowed values: a configuration's ``Literal`` annotations, checked when it is made."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(config: Any) -> None:
    """For ``__post_init__`` of a dataclass: raises ValueError, with the values there are, where a field annotated
    ``Literal[...]`` or ``tuple[Literal[...], ...]`` holds another."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        values = value if get_origin(hint) is tuple else (value,)
        choice = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if get_origin(choice) is not Literal:
            continue
        for given in values:
            if given not in get_args(choice):
                raise ValueError(f"{type(config).__name__}.{name}: expected one of {get_args(choice)}, got {given!r}")
