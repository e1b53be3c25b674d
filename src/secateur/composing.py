"""The verb `run_recipe`: stages one after the other, each resumable, and one report at the end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from secateur import hub
from secateur.compressing import compress
from secateur.costs.inputs import check_length
from secateur.costs.latency import time_interleaved
from secateur.edits.tokens import at_rest
from secateur.errors import AnotherRun
from secateur.front import Front, read_record
from secateur.given import judged_by, length_of, opened, setting_of
from secateur.optimize.points import Point
from secateur.recipes import Finetune, Recipe, Stage
from secateur.report import write_report
from secateur.report.card import card
from secateur.results import Result, measured, versions, vocabulary_digest, weights_digest
from secateur.run import Run, write_json
from secateur.searching import search
from secateur.starting import described
from secateur.tasks import Evaluation, Task, check_labels, evaluate, load_task
from secateur.tasks import fingerprint as data_fingerprint
from secateur.tasks.heads import head_class
from secateur.tasks.metrics import compute, paired_bootstrap
from secateur.train import finetune


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
        except AnotherRun:
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
