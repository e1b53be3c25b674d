"""Recipes: several stages on one model, from a file, each resumable, with one report at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from secateur import hub
from secateur.compressing import compress
from secateur.costs.budget import Budget
from secateur.costs.latency import time_interleaved
from secateur.errors import SecateurError
from secateur.front import Front, read_record
from secateur.given import judged_by, length_of, opened, setting_of
from secateur.methods import method_of
from secateur.optimize.points import Point, check_objectives
from secateur.report import write_report
from secateur.report.card import card
from secateur.results import Result, measured
from secateur.run import Method, Run, write_json
from secateur.searching import search
from secateur.starting import described
from secateur.tasks import Task, check_labels, evaluate, load_task
from secateur.tasks.metrics import paired_bootstrap
from secateur.train import finetune

KINDS = ("method", "search", "finetune")
FINETUNE = {"epochs": 3, "lr": 5e-5, "batch_size": 32, "max_length": 128, "dropout": None}
"""What a stage of fine-tuning may set."""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
        kind: "method", "search" or "finetune".
        name: of its folder.
        method: with its hyper-parameters; None for fine-tuning.
        budget: of a method, or limits of a search.
        objectives: of a search.
        pick: the point of a search that goes on: a budget, "knee", or a number.
        settings: of fine-tuning.
    """

    kind: str
    name: str
    method: Method | None
    budget: str | None
    objectives: tuple[str, ...]
    pick: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What to do with which model, on which data.

    Attributes:
        model: a folder, or a hub id.
        task: what `load_task` takes: `data`, and maybe `text`, `label`, `metric`.
        stages: in order; each begins with the model that the one before left.
        tokenizer: of the model, if its folder has none.
        split, batch, tokens, seed: as for `compress`.
        text: the recipe as plain values, which a resumed run compares.
    """

    model: str
    task: Mapping[str, Any]
    stages: tuple[Stage, ...]
    tokenizer: str | None
    split: str | None
    batch: int
    tokens: int | None
    seed: int
    text: Mapping[str, Any]

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
        """Check a recipe: every key, hyper-parameter and budget, before anything is computed.

        Raises:
            SecateurError: names the stage and what is wrong with it.
        """
        recipe = _keys(
            content, "A recipe", {"model", "task", "stages"}, {"tokenizer", "split", "batch", "tokens", "seed"}
        )
        task = {"data": recipe["task"]} if isinstance(recipe["task"], str) else recipe["task"]
        _keys(task, "'task'", {"data"}, {"text", "label", "metric"})
        if not isinstance(recipe["stages"], list) or not recipe["stages"]:
            raise SecateurError("A recipe has 'stages', a list of one or more.")
        return cls(
            model=str(recipe["model"]),
            task=task,
            stages=tuple(_stage(number, stage) for number, stage in enumerate(recipe["stages"], 1)),
            tokenizer=recipe.get("tokenizer"),
            split=recipe.get("split"),
            batch=recipe.get("batch", 1),
            tokens=recipe.get("tokens"),
            seed=recipe.get("seed", 0),
            text=recipe,
        )


def run_recipe(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    resume: bool = False,
    seconds: float = 4.0,
    progress: bool = False,
) -> Result:
    """Run the stages of a recipe one after the other, and compare the last model with the first.

    Args:
        recipe: a YAML file, or its content.
        out: folder to write the last model to, with `result.json` (first model against last), one `report.html` for
            everything, and `stages/` with the folder of each. Until then stages are kept in `<out>.run`.
        resume: go on with a run that was killed: finished stages are not done again, the last one goes on.
        seconds: how long to time two models, in turns.
        progress: show progress on standard error.

    Raises:
        SecateurError: what `Recipe.parse` refuses, or a stage cannot be done.
    """
    made = Recipe.read(recipe) if isinstance(recipe, (str, Path)) else Recipe.parse(recipe)
    hub.check_target(out, "result.json", made.model)
    data = load_task(made.task["data"], seed=made.seed, **{key: made.task[key] for key in made.task if key != "data"})
    target = Path(out).resolve()
    run = Run(target.with_name(f"{target.name}.run"), {"recipe": dict(made.text)}, resume=resume)
    folder, model, records = run.folder or target, made.model, []
    for number, stage in enumerate(made.stages, 1):
        place = folder / f"{number}-{stage.name}"
        step = partial(_done, made, stage, data, model, place, seconds, progress)
        model = str(run.timed(place.name, step))
        records += [read_record(place)] if stage.kind != "finetune" else []
    result = _compared(made, data, model, seconds, run.seconds)
    record = result.to_dict()

    def write(fresh: Path) -> None:
        hub.write_model(fresh, result.model, result.tokenizer, card(record))
        write_json(fresh / "result.json", record)
        shutil.copytree(folder, fresh / "stages", ignore=shutil.ignore_patterns("*.run", "run.json"))
        write_report([record, *records], fresh / "report.html")

    hub.save_folder(out, write)
    run.close()
    return result


def _done(made: Recipe, stage: Stage, data: Task, model: str, place: Path, seconds: float, progress: bool) -> Path:
    """The folder of the model that a stage leaves; a finished stage is not done again."""
    tokenizer = made.tokenizer if model == made.model else None
    going_on = place.with_name(f"{place.name}.run").exists()
    common: dict[str, Any] = {
        "task": data,
        "budget": stage.budget,
        "out": place,
        "tokenizer": tokenizer,
        "split": made.split,
        "batch": made.batch,
        "tokens": made.tokens,
        "seed": made.seed,
        "resume": going_on,
        "progress": progress,
    }
    if stage.method is None:
        if not (place / "config.json").is_file():
            settings = {**FINETUNE, **stage.settings}
            finetune(model, tokenizer, data, place, seed=made.seed, resume=going_on, progress=progress, **settings)
        return place
    if stage.kind == "method":
        if not (place / "result.json").is_file():
            compress(model, stage.method, seconds=seconds, **common)
        return place
    if not (place / "front.json").is_file():
        search(model, stage.method, objectives=stage.objectives, **common)
    front, chosen = Front.load(place), place / "picked"
    if not (chosen / "config.json").is_file():
        front.extract(_picked(front, stage.pick), chosen)
    return chosen


def _picked(front: Front, pick: str) -> Point:
    if pick == "knee":
        return front.knee()
    return front.point(int(pick)) if pick.isdecimal() else front.best(pick)


def _compared(made: Recipe, data: Task, last: str, seconds: float, spent: dict[str, float]) -> Result:
    """The last model against the first, judged and timed in one place."""
    source, first, words = opened(made.model, made.tokenizer, data)
    _, model, _ = opened(last, None, data)
    data = check_labels(data, first)
    rows, length = judged_by(data, made.split), length_of(data, first, words, made.tokens)
    before, after = (evaluate(net, words, data, rows) for net in (first, model))
    timings = time_interleaved({"before": first, "after": model}, made.batch, length, seconds=seconds)
    method = {"name": "recipe", "stages": [_described(stage) for stage in made.stages]}
    record = described(source, data, rows, method, made.seed, "run_recipe")
    record["task"]["difference"] = paired_bootstrap(
        data.metric, before.logits, after.logits, before.labels, names=data.label_names or ()
    )
    return Result(
        **record,
        name="recipe",
        budget={"text": ", then ".join(_described(stage) for stage in made.stages), "terms": []},
        before=measured(first, made.batch, length, before.metrics, timings["before"]),
        after=measured(model, made.batch, length, after.metrics, timings["after"]),
        predicted={},
        latency_setting=setting_of(timings["after"]),
        seconds=spent,
        edits=[edit.to_dict() for edit in hub.edits_of(model)],
        subnetwork={},
        blocks={},
        scores={},
        model=model,
        tokenizer=words,
        given_bytes=hub.given_bytes(source),
    )


def _described(stage: Stage) -> str:
    """A stage in a few words."""
    return f"{stage.name} {stage.pick or stage.budget or ''}".strip()


def _stage(number: int, content: object) -> Stage:
    """A stage of a recipe, checked."""
    where = f"Stage {number}"
    stage = _keys(content, where, set(), {*KINDS, "set", "budget", "objectives", "pick"})
    kinds = [kind for kind in KINDS if kind in stage]
    if len(kinds) != 1:
        raise SecateurError(f"{where} has one of {', '.join(KINDS)}.")
    kind = kinds[0]
    if kind == "finetune":
        _keys(stage, where, {"finetune"}, set())
        settings = _keys(stage["finetune"] or {}, f"{where}, finetune,", set(), set(FINETUNE))
        return Stage(kind, "finetune", None, None, (), "", {key: _value(value) for key, value in settings.items()})
    only = {"objectives", "pick"} if kind == "search" else set()
    _keys(stage, where, {kind}, {"set", "budget"} | only)
    settings = _keys(stage.get("set") or {}, f"{where}, set,", set(), None)
    try:
        method = method_of(str(stage[kind]), **{key: _value(value) for key, value in settings.items()})
        if kind == "search" and not hasattr(method, "search"):
            raise SecateurError(f"{method.name} makes one model, not a front.")
        budget = stage.get("budget", method.usual_budget if kind == "method" else None)
        if budget is not None:
            Budget.parse(str(budget)).check_kinds(method.budgets, method.name)
        pick = str(stage.get("pick", "knee")) if kind == "search" else ""
        if pick not in ("", "knee") and not pick.isdecimal():
            Budget.parse(pick)
        asked = stage.get("objectives", ["error", "params"])
        objectives = check_objectives(asked.replace(" ", "").split(",") if isinstance(asked, str) else asked)
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from None
    return Stage(kind, method.name, method, budget and str(budget), objectives, pick, {})


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


def _value(value: Any) -> Any:
    """A hyper-parameter; text that JSON reads as a number is one (YAML takes 5e-5 for text)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
