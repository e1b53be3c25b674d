"""Recipes: several stages on one model, from a file, each resumable, with one report at the end."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from secateur import hub
from secateur.checks import check_fields, check_shares
from secateur.compressing import compress
from secateur.costs.budget import Budget
from secateur.costs.inputs import check_length
from secateur.costs.latency import time_interleaved
from secateur.edits.tokens import at_rest
from secateur.errors import SecateurError
from secateur.front import Front, read_record
from secateur.given import judged_by, length_of, opened, setting_of
from secateur.methods import method_of
from secateur.optimize.points import DEAR, ERROR, OBJECTIVES, Point, check_objectives
from secateur.report import write_report
from secateur.report.card import card
from secateur.results import Result, measured, versions, vocabulary_digest, weights_digest
from secateur.run import Method, Run, write_json
from secateur.searching import search
from secateur.starting import described
from secateur.tasks import Evaluation, Task, check_labels, evaluate, load_task
from secateur.tasks import fingerprint as data_fingerprint
from secateur.tasks.heads import head_class
from secateur.tasks.metrics import compute, paired_bootstrap
from secateur.train import finetune

OTHER = ("was started with another", "holds a run with other settings")
"""What says that a killed stage was begun under other circumstances."""
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
        if "bit" in names and (names.index("bit") < len(names) - 1 or "late" in names):
            raise SecateurError(
                "bit is the last stage, and does not go with late: a binary model cannot be cut any more, and one that "
                "eliminates tokens cannot be made binary."
            )
        return cls(model=recipe["model"], task=task, stages=stages, **given)


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
        out: folder to write the last model to, with `result.json` (first model against last; if the recipe begins by
            fine-tuning, the model that is left by that), one `report.html` for everything, and `stages/` with the
            folder of each. Until then stages are kept in `<out>.run`.
        resume: go on with a run that was killed, or whose recipe was changed: what is done again begins with the first
            stage that is not finished, or not the same.
        seconds: how long to time two models, in turns.
        progress: show progress on standard error.

    Raises:
        SecateurError: what `Recipe.parse` refuses, or a stage cannot be done.
    """
    made = Recipe.read(recipe) if isinstance(recipe, (str, Path)) else Recipe.parse(recipe)
    hub.check_target(out, "result.json", made.model)
    data = load_task(made.task["data"], seed=made.seed, **{k: v for k, v in made.task.items() if k != "data"})
    learns = isinstance(made.stages[0].does, Finetune)  # then a head may be missing, and is drawn at random
    first = hub.open_model(made.model, head_class(data), trained=not learns)
    words = hub.open_tokenizer(made.tokenizer or made.model)
    judged_by(data, made.split)
    if made.tokens is not None:
        check_length(first, made.tokens)
    target = Path(out).resolve()
    identity = {
        "model": weights_digest(first.base_model if learns else first),
        "tokenizer": vocabulary_digest(words),
        "task": [data_fingerprint(data), dict(made.task)],
        "setting": made.seed,
        "versions": versions(),
    }
    run = Run(target.with_name(f"{target.name}.run"), identity, resume=resume)
    work = _Work(made, data, run.folder or target, seconds, progress)
    model = base = made.model
    key, spent, records = "", {}, []
    for number, stage in enumerate(made.stages, 1):
        name, key = f"{number}-{stage.does.name}", stage.key(key, made)
        model = str(work.done(stage, name, key, model))
        key += stage.pick
        spent[name] = work.seconds_of(name)
        if all(isinstance(each.does, Finetune) for each in made.stages[:number]):
            base = model
        if not isinstance(stage.does, Finetune):
            records.append({**read_record(work.folder / name), "folder": str(target / "stages" / name)})
    result = _compared(made, data, base, model, seconds, spent)
    there, here = str(target / "stages"), str(work.folder)  # where stages will be, and are
    record, *records = (_moved(each, here, there) for each in (result.to_dict(), *records))

    def write(fresh: Path) -> None:
        hub.write_model(fresh, result.model, result.tokenizer, card(record))
        write_json(fresh / "result.json", record)
        for name in spent:
            shutil.copytree(work.folder / name, fresh / "stages" / name)
        for file in (fresh / "stages").rglob("*"):
            if file.name in ("result.json", "front.json", "point.json", "README.md"):
                file.write_text(file.read_text("utf-8").replace(here, there), "utf-8")
        for one in records:  # their pages name the folder that they are in now
            write_report([one], fresh / "stages" / Path(one["folder"]).name / "report.html")
        write_report([record, *records], fresh / "report.html")

    hub.save_folder(out, write)
    run.close()
    return result


@dataclass
class _Work:
    """What the stages of a run share."""

    made: Recipe
    data: Task
    folder: Path
    seconds: float
    progress: bool

    def done(self, stage: Stage, name: str, key: str, model: str) -> Path:
        """The folder of the model that a stage leaves; what is there is kept if it is of the same settings."""
        place, note, clock = self.folder / name, self.folder / f"{name}.key", self.folder / f"{name}.seconds"
        if not note.is_file() or note.read_text() != key:
            for old in (place, place.with_name(f"{name}.run")):
                shutil.rmtree(old, ignore_errors=True)
            clock.write_text("0")
            note.write_text(key)
        if not (place / stage.mark).is_file():
            start = time.perf_counter()
            try:
                self._do(stage, place, model)
            finally:
                clock.write_text(f"{self.seconds_of(name) + time.perf_counter() - start:.3f}")
        if not stage.objectives:
            return place
        front = Front.load(place)
        point = _picked(front, stage.pick)
        chosen = place / f"point-{point.number}"
        if not (chosen / "config.json").is_file():
            front.extract(point, chosen)
        return chosen

    def seconds_of(self, name: str) -> float:
        """What a finished stage took."""
        return float((self.folder / f"{name}.seconds").read_text())

    def _do(self, stage: Stage, place: Path, model: str) -> None:
        made = self.made
        tokenizer = made.tokenizer if model == made.model else None
        run = place.with_name(f"{place.name}.run")
        resume = any((run / marker).is_file() for marker in ("run.json", "finetune.json"))
        try:
            self._go(stage, place, model, tokenizer, resume)
        except SecateurError as error:
            if not resume or not any(words in str(error) for words in OTHER):
                raise
            shutil.rmtree(run)  # other threads, say: this stage begins anew, finished ones stay
            self._go(stage, place, model, tokenizer, False)

    def _go(self, stage: Stage, place: Path, model: str, tokenizer: str | None, resume: bool) -> None:
        made = self.made
        common: dict[str, Any] = {"seed": made.seed, "resume": resume, "progress": self.progress}
        if isinstance(stage.does, Finetune):
            finetune(model, tokenizer, self.data, place, **asdict(stage.does), **common)
            return
        common |= {"task": self.data, "budget": stage.budget, "out": place, "tokenizer": tokenizer}
        common |= {"split": made.split, "batch": made.batch, "tokens": made.tokens}
        if stage.objectives:
            search(model, stage.does, objectives=stage.objectives, seconds=min(self.seconds, 1.0), **common)
        else:
            compress(model, stage.does, seconds=self.seconds, **common)


def _moved(record: dict[str, Any], here: str, there: str) -> dict[str, Any]:
    """A record in which a folder has another place."""
    old, new = (json.dumps(text)[1:-1] for text in (here, there))
    return dict(json.loads(json.dumps(record).replace(old, new)))


def _picked(front: Front, pick: str) -> Point:
    if pick == "knee":
        return front.knee()
    return front.point(int(pick)) if pick.isdecimal() else front.best(pick)


def _compared(made: Recipe, data: Task, base: str, last: str, seconds: float, spent: dict[str, float]) -> Result:
    """The last model against the first one that was trained for the task, judged and timed in one place."""
    source, first, words = opened(base, made.tokenizer if base == made.model else None, data)
    _, model, _ = opened(last, None, data)
    first = at_rest(first)
    ours = check_labels(data, first)
    searched = any(getattr(stage.does, "holdout", 1) == 0 for stage in made.stages)
    rows = judged_by(data, "test" if searched and made.split is None and "test" in data.splits() else made.split)
    length = length_of(data, first, words, made.tokens)
    before = evaluate(first, words, ours, rows)
    after = _in_order_of(before, evaluate(model, words, data, rows), ours, check_labels(data, model).label_names)
    timings = time_interleaved({"before": first, "after": model}, made.batch, length, seconds=seconds)
    method = {"name": "recipe", "stages": [str(stage) for stage in made.stages]}
    record = described(source, data, rows, method, made.seed, "run_recipe")
    record["task"]["difference"] = paired_bootstrap(
        data.metric, before.logits, after.logits, before.labels, names=ours.label_names or ()
    )
    return Result(
        **record,
        name="recipe",
        budget={"text": ", then ".join(map(str, made.stages)), "terms": []},
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


def _in_order_of(before: Evaluation, after: Evaluation, data: Task, theirs: tuple[str, ...] | None) -> Evaluation:
    """An evaluation, with its classes' names in their order, as one of the same rows in the order of a task."""
    if data.kind == "regression" or torch.equal(before.labels, after.labels):
        return after
    ours, others = ([name.casefold() for name in names or ()] for names in (data.label_names, theirs))
    logits = after.logits[..., [others.index(name) for name in ours]]
    return Evaluation(compute(data, logits, before.labels), logits, before.labels)


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
