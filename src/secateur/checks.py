"""Checks of hyper-parameters, for dataclasses that have a `name`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

from secateur.errors import SecateurError


def check_fields(method: Any) -> None:
    """Check a method's hyper-parameters against their types: choices, whole numbers from 1, numbers from 0.

    Raises:
        SecateurError: names the first one that does not fit.
    """
    hints = get_type_hints(type(method))
    for name in (f.name for f in fields(method)):
        value, kinds = getattr(method, name), _kinds(hints[name])
        choices = [kind for kind in kinds if isinstance(kind, str)]
        fits = (
            (value is None and type(None) in kinds)
            or (isinstance(value, bool) and bool in kinds)
            or (isinstance(value, str) and (value in choices or str in kinds))
            or (type(value) is int and int in kinds and value >= 1)
            or (type(value) in (int, float) and float in kinds and 0 <= value < float("inf"))
        )
        if not fits:
            wanted = {
                bool: "true or false",
                int: "a whole number from 1",
                float: "a number from 0",
                str: "a text",
                type(None): "none",
            }
            raise SecateurError(
                f"{method.name}: {name} is {' or '.join([*choices, *(wanted[k] for k in kinds if k in wanted)])}, "
                f"not {value!r}."
            )


def check_shares(settings: Any, *names: str, below: bool = False) -> None:
    """Check that hyper-parameters are shares, from 0 to 1, or below 1.

    Raises:
        SecateurError: names the first one that is not.
    """
    for name in names:
        value = getattr(settings, name) or 0
        if value > 1 or (below and value == 1):
            raise SecateurError(
                f"{settings.name}: {name} is a share, from 0 to {'below ' if below else ''}1, not {value:g}."
            )


def _kinds(hint: Any) -> list[Any]:
    """The types and literal values that a hint allows."""
    parts = get_args(hint)
    return [kind for part in parts for kind in _kinds(part)] if parts else [hint]
