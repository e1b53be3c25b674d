"""Recipes: what several stages do to one model, read from a file and checked before anything is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from secateur.checks import check_fields, check_shares
from secateur.costs.budget import Budget
from secateur.errors import SecateurError
from secateur.methods import method_of
from secateur.optimize.points import DEAR, ERROR, OBJECTIVES, check_objectives
from secateur.run import Method

KINDS = ("method", "search", "finetune")


@dataclass(frozen=True)
class Finetune:
    """What a stage of fine-tuning may set, as `finetune` takes it."""

    epochs: int = 3
    lr: float = 5e-5
    batch_size: int = 32
    max_length: int = 128
    dropout: float | None = None

    name: ClassVar[str] = "finetune"

    def __post_init__(self) -> None:
        check_fields(self)
        check_shares(self, "dropout", below=True)


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
        does: a method with its hyper-parameters, or fine-tuning.
        budget: of a method, or limits of a search.
        objectives: of a search; empty for what makes one model.
        pick: the point of a search that goes on: a budget, "knee", or a number.
    """

    does: Method | Finetune
    budget: str | None = None
    objectives: tuple[str, ...] = ()
    pick: str = ""

    def __str__(self) -> str:
        return f"{self.does.name} {self.pick or self.budget or ''}".strip()

    @property
    def mark(self) -> str:
        """A file that the folder of the stage holds once it is done."""
        return "front.json" if self.objectives else "config.json" if isinstance(self.does, Finetune) else "result.json"

    def key(self, before: str, made: Recipe) -> str:
        """What the folder of the stage depends on: its settings, and those of what came before."""
        settings: list[Any] = [self.does.name, asdict(self.does), self.budget, self.objectives]  # type: ignore[arg-type]
        settings += [] if isinstance(self.does, Finetune) else [made.split, made.batch, made.tokens]
        return hashlib.sha256(json.dumps([before, settings], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Recipe:
    """What to do with which model, on which data.

    Attributes:
        model: a folder, or a hub id.
        task: what `load_task` takes: `data`, and maybe `text`, `label`, `metric`.
        stages: in order; each begins with the model that the one before left.
        tokenizer: of the model, if its folder has none.
        split, batch, tokens, seed: as for `compress`.
    """

    model: str
    task: Mapping[str, str]
    stages: tuple[Stage, ...]
    tokenizer: str | None = None
    split: str | None = None
    batch: int = 1
    tokens: int | None = None
    seed: int = 0

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML file.

        Raises:
            SecateurError: the file is missing or no YAML, or holds what `parse` refuses.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SecateurError(f"There is no recipe '{path}' ({error}).") from None
        except yaml.YAMLError as error:
            raise SecateurError(f"'{path}' is no YAML: {' '.join(str(error).split())}") from None
        return cls.parse(content)

    @classmethod
    def parse(cls, content: object) -> Recipe:
        """Check a recipe: every key, type, hyper-parameter and budget, before anything is computed.

        Raises:
            SecateurError: names the stage and what is wrong with it.
        """
        kinds = {"tokenizer": str, "split": str, "batch": int, "tokens": int, "seed": int}
        recipe = _keys(content, "A recipe", {"model", "task", "stages"}, set(kinds))
        given = {key: recipe[key] for key in kinds if recipe.get(key) is not None}
        task = {"data": recipe["task"]} if isinstance(recipe["task"], str) else recipe["task"]
        _keys(task, "'task'", {"data"}, {"text", "label", "metric"})
        _typed({"model": recipe["model"], **{f"task, {key}": value for key, value in task.items()}, **given}, kinds)
        if not isinstance(recipe["stages"], list) or not recipe["stages"]:
            raise SecateurError("A recipe has 'stages', a list of one or more.")
        stages = tuple(_stage(number, stage) for number, stage in enumerate(recipe["stages"], 1))
        if all(isinstance(stage.does, Finetune) for stage in stages):
            raise SecateurError("A recipe has a stage that cuts: to fine-tune alone, take `secateur finetune`.")
        names = [stage.does.name for stage in stages]
        if "bit" in names and names[names.index("bit") + 1 :] not in ([], ["late"]):
            raise SecateurError(
                "bit is the last stage, or late comes behind it: a binary model cannot be cut any more, but for its "
                "tokens."
            )
        if names.count("late") > 1:
            raise SecateurError("late is there once: a model that eliminates tokens has its dial already.")
        return cls(model=recipe["model"], task=task, stages=stages, **given)


def _stage(number: int, content: object) -> Stage:
    """A stage of a recipe, checked."""
    where = f"Stage {number}"
    stage = _keys(content, where, set(), {*KINDS, "set", "budget", "objectives", "pick"})
    kinds = [kind for kind in KINDS if kind in stage]
    if len(kinds) != 1:
        raise SecateurError(f"{where} has one of {', '.join(KINDS)}.")
    kind = kinds[0]
    others = {"finetune": set(), "method": {"set", "budget"}, "search": {"set", "budget", "objectives", "pick"}}
    _keys(stage, where, {kind}, others[kind])
    if kind == "finetune":
        settings = _keys(stage[kind] or {}, f"{where}, finetune,", set(), {f.name for f in fields(Finetune)})
    else:
        settings = _keys(stage.get("set") or {}, f"{where}, set,", set(), None)
    settings = {key: _value(value) for key, value in settings.items()}
    try:
        if kind == "finetune":
            return Stage(Finetune(**settings))
        method = method_of(str(stage[kind]), **settings)
        budget = stage.get("budget", method.usual_budget if kind == "method" else None)
        text = None if budget is None else str(budget)
        asked = Budget.parse(text) if text is not None else None
        if asked is not None:
            asked.check_kinds(method.budgets, method.name)
        if kind == "method":
            return Stage(method, text)
        if not hasattr(method, "search"):
            raise SecateurError(f"{method.name} makes one model, not a front.")
        objectives = _objectives(stage.get("objectives", "error,params"))
        pick = str(stage.get("pick", "knee"))
        if pick != "knee" and not pick.isdecimal():
            counted = {name for name in OBJECTIVES if name not in {ERROR, *DEAR} or name in objectives}
            Budget.parse(pick).check_kinds(counted | (asked.kinds if asked else set()) | {"speedup"}, "pick")
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from None
    return Stage(method, text, objectives, pick)


def _objectives(asked: object) -> tuple[str, ...]:
    names = asked.replace(" ", "").split(",") if isinstance(asked, str) else asked
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SecateurError(f"'objectives' is a list of names, not {asked!r}.")
    return check_objectives(names)


def _keys(content: object, where: str, needed: set[str], others: set[str] | None) -> dict[str, Any]:
    """A mapping that has the keys it needs and none that are unknown (`others` None: any)."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise SecateurError(f"{where} is a mapping of keys to values, not {type(content).__name__}.")
    if missing := sorted(needed - set(content)):
        raise SecateurError(f"{where} lacks {', '.join(missing)}.")
    known = needed | (others or set())
    if others is not None and (unknown := sorted(set(content) - known)):
        raise SecateurError(f"{where} has no {', '.join(unknown)}: it has {', '.join(sorted(known))}.")
    return dict(content)


def _typed(values: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Refuse what is neither a text nor, where `kinds` says so, a whole number."""
    for key, value in values.items():
        kind = kinds.get(key, str)
        if type(value) is not kind or (isinstance(value, int) and value < (0 if key == "seed" else 1)):
            raise SecateurError(f"A recipe: {key} is {'a text' if kind is str else 'a whole number'}, not {value!r}.")


def _value(value: Any) -> Any:
    """A hyper-parameter; text that JSON reads as a number is one (YAML takes 5e-5 for text)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
