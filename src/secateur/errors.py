"""Errors that a user can act on: each message names what is wrong and what to do."""

from __future__ import annotations


class SecateurError(Exception):
    """Base of every error that secateur raises on purpose; the command line prints it in one line and exits with 2."""


class UnsupportedModel(SecateurError):
    """The architecture is not in the family table, or differs from it."""


class InvalidBudget(SecateurError):
    """A budget that cannot be read, is of a kind the method does not take, or cannot be met."""


class InvalidData(SecateurError):
    """Data that does not fit the task or the model."""


class InvalidModel(SecateurError):
    """A model folder that cannot be opened, or a model whose outputs are not finite."""


class AnotherRun(SecateurError):
    """A killed run that is to be resumed was begun with other settings, data or weights."""


class MissingExtra(SecateurError):
    """An optional dependency is not installed."""
