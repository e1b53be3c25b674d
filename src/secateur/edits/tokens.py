"""`DropTokens`: layers hand on fewer tokens, as many as a dial says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, get_args

import torch
from torch import Tensor, nn

from secateur.costs.budget import Budget
from secateur.costs.dial import alpha_for_latency
from secateur.costs.tokens import FASTEST, TokenCosts, token_costs
from secateur.errors import InvalidBudget, InvalidData, InvalidModel, SecateurError, UnsupportedModel
from secateur.families import sites
from secateur.tokens import handover
from secateur.tokens.scores import Weighting, shares
from secateur.tokens.state import Pass, Selection
from secateur.tokens.traced import TracedPass

Model = TypeVar("Model", bound=nn.Module)

ATTRIBUTE = "secateur"
"""The attribute of a model that holds its dial."""


@dataclass(frozen=True)
class DropTokens:
    """Eliminate tokens between attention and feed-forward block of each layer, by a profile and a dial.

    Attributes:
        profile: m_l of each layer (`tokens.scores.profile`).
        tokens: length at which a speed-up counts.
        alpha: dial setting that the model opens with; 0 is the dense model.
        weighting, diagonal, beta, queries: how tokens are scored (`tokens.state.Selection`).
        least: floor of the share of tokens that a layer hands on.
        protected: tokens at the beginning that always stay.
        recent: tokens at the end that always stay; a decoder needs at least its last one.
        steeper: a second profile, which the dial goes over to above alpha = 1 (`tokens.scores.shares`); none if empty.
    """

    profile: tuple[float, ...]
    tokens: int = 128
    alpha: float = 0.0
    weighting: Weighting = "value"
    diagonal: bool = False
    beta: float = 0.0
    least: float = 0.02
    protected: int = 1
    recent: int = 0
    steeper: tuple[float, ...] = ()
    queries: int = 64

    type: ClassVar[str] = "drop_tokens"

    def __post_init__(self) -> None:
        falling = all(0 < b <= a <= 1 for a, b in zip((1.0, *self.profile), self.profile, strict=False))
        if not self.profile or not falling:
            raise SecateurError("The elimination profile has a share in (0, 1] for each layer, never rising.")
        if self.steeper and (
            len(self.steeper) != len(self.profile)
            or not all(0 < s <= m for s, m in zip(self.steeper, self.profile, strict=True))
        ):
            raise SecateurError("The steeper profile has a share for each layer, above 0 and not above the profile's.")
        if self.weighting not in get_args(Weighting):
            raise SecateurError(f"weighting is {' or '.join(get_args(Weighting))}, not {self.weighting!r}.")
        if not (self.alpha >= 0 and math.isfinite(self.alpha) and 0 <= self.beta < 1 and 0 < self.least <= 1):
            raise SecateurError("alpha is a number from 0, beta lies in [0, 1), least in (0, 1].")
        if self.tokens < 1 or self.protected < 1 or self.queries < 1 or self.recent < 0:
            raise SecateurError("tokens, protected and queries are whole numbers from 1, recent from 0.")

    @property
    def changes_shapes(self) -> bool:
        """No tensor changes."""
        return False

    def apply(self, model: nn.Module, *, empty: bool = False) -> None:
        """Put the hooks and the dial (`model.secateur`) into a model, in place.

        Args:
            model: an encoder that no other `DropTokens` is in.
            empty: accepted for the protocol; no tensor is touched.

        Raises:
            UnsupportedModel: a family whose tokens cannot be eliminated, or whose attention cannot be scored this way.
            SecateurError: the profile has another number of layers, or the model has a dial already.
        """
        found = sites(model)
        spec = handover.token_spec(found)
        if hasattr(model, ATTRIBUTE):
            raise SecateurError("This model eliminates tokens already: set model.secateur.speedup.")
        if len(self.profile) != len(found.neurons):
            raise SecateurError(f"The profile has {len(self.profile)} layers, the model {len(found.neurons)}.")
        if spec.causal and not self.recent:
            raise SecateurError("A decoder's last token makes the next one: protect it with recent=1 or more.")
        dial = Dial(model, self)
        handover.install(model, dial)
        setattr(model, ATTRIBUTE, dial)

    def present(self, model: nn.Module) -> DropTokens:
        """The edit with the dial where it stands now."""
        return dial_of(model).edit

    def shares(self, alpha: float) -> tuple[float, ...]:
        """Share of its tokens that each layer hands on at a setting."""
        return shares(self.profile, alpha, self.least, self.steeper)

    def speedup(self, costs: TokenCosts, alpha: float, tokens: int | None = None) -> float:
        """The speed-up of a setting, for layers of these costs, at a length; at the edit's own if None."""
        stay = self.protected + self.recent
        return costs.at(self.profile, alpha, tokens or self.tokens, self.least, stay, self.steeper)

    def alpha_for(self, costs: TokenCosts, speedup: float, tokens: int | None = None) -> float:
        """The setting for a wanted speed-up.

        Raises:
            SecateurError: below 1.
            InvalidBudget: beyond reach.
        """
        stay = self.protected + self.recent
        return costs.solve(self.profile, speedup, tokens or self.tokens, self.least, stay, self.steeper)

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **asdict(self), "profile": list(self.profile), "steeper": list(self.steeper)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DropTokens:
        """Inverse of `to_dict`.

        Raises:
            InvalidModel: unknown or missing keys, or values that cannot be read.
        """
        values = {key: value for key, value in data.items() if key != "type"}
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            wrong = sorted(set(values) ^ known)
            raise InvalidModel(f"config.json: the drop_tokens edit has unknown or missing keys: {', '.join(wrong)}.")
        try:
            lists = {name: tuple(map(float, values[name])) for name in ("profile", "steeper")}
            return cls(**{**values, **lists})
        except (SecateurError, TypeError, ValueError) as error:
            raise InvalidModel(f"config.json: the drop_tokens edit cannot be read: {error}") from None


@dataclass(frozen=True)
class _Now:
    """What one thread does with a dial for a while.

    Attributes:
        alpha: the setting.
        shares: share of its tokens that each layer hands on, in place of what the setting says.
        watch: called with each pass, in which every layer scores and none eliminates.
    """

    alpha: float = 0.0
    shares: tuple[float, ...] | None = None
    watch: Callable[[Pass], None] | None = None


_NOW: ContextVar[Mapping[int, _Now]] = ContextVar("secateur_dials", default=MappingProxyType({}))
"""By identity of the dial: settings that hold in this thread, within a context."""


class Dial:
    """Speed-up of a model at run time, without further training: `model.secateur`.

    Attributes:
        packed: run without padding between the first layer and the last; None does so where the family can.
        selection: how tokens are chosen.
    """

    # a misspelt setting is an error instead of a new attribute
    __slots__ = ("_alpha", "_can_pack", "_costs", "_edit", "_latency_budget", "_model", "packed", "selection")

    def __init__(self, model: nn.Module, edit: DropTokens) -> None:
        self._edit = edit
        self._costs: tuple[object, TokenCosts] | None = None
        self._model = model
        self._can_pack = handover.packs(model)
        self._latency_budget: float | None = None
        self.packed: bool | None = None
        self.selection = Selection(
            edit.weighting,
            edit.diagonal,
            edit.beta,
            edit.queries,
            edit.protected,
            edit.recent,
            causal=handover.is_causal(model),
        )
        self.alpha = edit.alpha

    @property
    def alpha(self) -> float:
        """The exponent α on the profile: 0 is the dense model, larger is faster."""
        now = _NOW.get().get(id(self))
        return self._alpha if now is None else now.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        if not (value >= 0 and math.isfinite(value)):
            raise SecateurError(f"alpha is a number from 0 (the dense model) upwards, not {value}.")
        self._alpha = float(value)
        self._latency_budget = None

    @property
    def tokens(self) -> int:
        """Length at which a speed-up counts."""
        return self._edit.tokens

    @property
    def profile(self) -> tuple[float, ...]:
        """m_l of each layer."""
        return self._edit.profile

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of its tokens that each layer hands on at the present setting."""
        now = _NOW.get().get(id(self))
        if now is not None and now.shares is not None:
            return now.shares
        return self._edit.shares(self.alpha)

    @property
    def costs(self) -> TokenCosts:
        """MACs of the layers, as wide as they are now."""
        widths = tuple(site.units for site in sites(self._model))
        if self._costs is None or self._costs[0] != widths:
            with self.at(0.0):
                self._costs = (widths, token_costs(self._model))
        return self._costs[1]

    @property
    def speedup(self) -> float:
        """MACs of the dense layers over those with elimination, for one example of `tokens` tokens."""
        return self.speedup_at(self.alpha)

    @speedup.setter
    def speedup(self, value: float) -> None:
        self.alpha = self.alpha_for(value)

    @property
    def reach(self) -> float:
        """The largest speed-up."""
        return self.speedup_at(FASTEST)

    @property
    def latency_budget(self) -> float | None:
        """Milliseconds that were asked for one example of `tokens` tokens here; None if a speed-up was."""
        return self._latency_budget

    @latency_budget.setter
    def latency_budget(self, wanted: str | float) -> None:
        text = f"{wanted}ms" if isinstance(wanted, (int, float)) else wanted
        terms = Budget.parse(f"latency<={text}").terms
        if len(terms) > 1 or terms[0].unit == "%":
            raise InvalidBudget(f"A latency budget is a time, such as '8ms', not '{text}'.")
        milliseconds = terms[0].limit(0)
        self.alpha = alpha_for_latency(self._model, self, milliseconds, 1, self.tokens)
        self._latency_budget = milliseconds

    @property
    def edit(self) -> DropTokens:
        """The edit with the present setting, as it is saved."""
        return replace(self._edit, alpha=self._alpha)

    @property
    def active(self) -> bool:
        """Whether the next pass of this thread eliminates or watches tokens."""
        now = _NOW.get().get(id(self))
        return self._alpha > 0 if now is None else now != _Now()

    def speedup_at(self, alpha: float, tokens: int | None = None) -> float:
        """The speed-up of a setting at a length."""
        return self._edit.speedup(self.costs, alpha, tokens)

    def alpha_for(self, speedup: float, tokens: int | None = None) -> float:
        """The setting for a wanted speed-up at a length.

        Raises:
            SecateurError: below 1.
            InvalidBudget: beyond reach.
        """
        return self._edit.alpha_for(self.costs, speedup, tokens)

    def at(self, alpha: float) -> AbstractContextManager[None]:
        """Another setting within the context, for this thread alone; 0 is the dense model."""
        return self._now(_Now(alpha))

    def handing_on(self, shares: tuple[float, ...]) -> AbstractContextManager[None]:
        """Layers hand on these shares of the tokens within the context, for this thread alone."""
        return self._now(_Now(shares=shares))

    def watch(self, seen: Callable[[Pass], None]) -> AbstractContextManager[None]:
        """The dense model within the context, scoring its tokens in every layer, for this thread alone.

        Args:
            seen: called with each pass at its beginning; after it, `Pass.seen` holds the scores by layer.
        """
        return self._now(_Now(watch=seen))

    @contextmanager
    def _now(self, now: _Now) -> Iterator[None]:
        token = _NOW.set({**_NOW.get(), id(self): now})
        try:
            yield
        finally:
            _NOW.reset(token)

    def begin(self, real: Tensor) -> Pass:
        """Begin a forward pass.

        Args:
            real: True for real tokens, (batch, tokens).

        Raises:
            InvalidData: an example without a single real token.
            SecateurError: gradient checkpointing, which runs layers again when the pass is over.
        """
        if torch.compiler.is_exporting():
            return TracedPass(real, self.shares, self.selection)
        if not bool(real.any(dim=-1).all()):
            row = int((~real.any(dim=-1)).nonzero()[0])
            raise InvalidData(f"Row {row} of the attention_mask has no real token: give each text at least one.")
        if self._model.training and _runs_layers_again(self._model):
            raise SecateurError("Token elimination cannot be trained with gradient checkpointing: turn it off.")
        packed = self._can_pack if self.packed is None else self.packed
        if packed and not self._can_pack:
            raise UnsupportedModel("This family's attention cannot run packed: set model.secateur.packed = False.")
        now = _NOW.get().get(id(self))
        watch = None if now is None else now.watch
        made = Pass(real, None if watch is not None else self.shares, self.selection, packed)
        if watch is not None:
            watch(made)
        return made


def _runs_layers_again(model: Any) -> bool:
    """Whether gradients are checkpointed; the property's name depends on the release of transformers."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(model, name):
            return bool(getattr(model, name))
    return False


def has_dial(model: nn.Module) -> bool:
    """Whether a model has a dial."""
    return isinstance(getattr(model, ATTRIBUTE, None), Dial)


def dial_of(model: nn.Module) -> Dial:
    """The dial of a model.

    Raises:
        SecateurError: it has none.
    """
    dial = getattr(model, ATTRIBUTE, None)
    if not isinstance(dial, Dial):
        raise SecateurError("This model has no dial: compress it with the method 'late' first.")
    return dial


@contextmanager
def turned_to(model: nn.Module, speedup: float | None, tokens: int | None = None) -> Iterator[None]:
    """The model's dial at a speed-up (for texts of so many tokens) within the context; None leaves it as it is.

    Raises:
        SecateurError: the model has no dial, or the speed-up is below 1.
        InvalidBudget: it is beyond reach.
    """
    if speedup is None:
        yield
        return
    dial = dial_of(model)
    with dial.at(dial.alpha_for(speedup, tokens)):
        yield


def at_rest(model: Model) -> Model:
    """The model with its dial, if it has one, at 1: itself, or a copy if it stands elsewhere."""
    dial = dial_of(model) if has_dial(model) else None
    if dial is None or dial.alpha == 0:
        return model
    twin = copy.deepcopy(model)
    dial_of(twin).alpha = 0.0
    return twin
