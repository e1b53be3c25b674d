"""Requests that are not answered: each with a status, a reason in one line, and when to come again."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from secateur.errors import MissingExtra, SecateurError


class Refused(SecateurError):
    """A request that is not answered.

    Args:
        status: of HTTP: 408 too slow, 413 too large, 429 too many, 503 not any more.
        reason: one line.
        retry: seconds after which it may be asked again; None if that is of no use.
    """

    def __init__(self, status: int, reason: str, retry: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry = None if retry is None else max(1, math.ceil(retry))


def extra(module: str, name: str) -> Any:
    """A module that an extra installs.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise MissingExtra(f"Serving needs {module}: install secateur[{name}].") from None
