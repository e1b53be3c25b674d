"""Compression methods: one file each, one line here, one card in the docs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from secateur.errors import SecateurError
from secateur.methods.baselines import Baseline
from secateur.methods.bit import Bit
from secateur.methods.late import Late
from secateur.methods.mgpp import Mgpp
from secateur.methods.nas import Nas
from secateur.methods.optin import Optin
from secateur.methods.ptf import Ptf
from secateur.run import Method

__all__ = ["METHODS", "Baseline", "Bit", "Late", "Mgpp", "Nas", "Optin", "Ptf", "method_of"]

METHODS: dict[str, type[Any]] = {
    "optin": Optin,
    "ptf": Ptf,
    "late": Late,
    "mgpp": Mgpp,
    "bit": Bit,
    "nas": Nas,
    "baseline": Baseline,
}


def method_of(method: str | Method, /, **settings: Any) -> Method:
    """A method by name, with its hyper-parameters; an instance is returned as it is.

    Raises:
        SecateurError: an unknown method or hyper-parameter.
    """
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise SecateurError(f"Unknown method '{method}': choose from {', '.join(METHODS)}.")
    known = [f.name for f in fields(METHODS[method])]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise SecateurError(f"Method '{method}' has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
    made: Method = METHODS[method](**settings)
    return made
