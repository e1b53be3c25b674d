"""A run: what a method is given, what it hands back, and the folder that lets a killed run go on."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from secateur.costs.analytic import macs, params
from secateur.costs.budget import Constraint
from secateur.edits import Edit
from secateur.errors import AnotherRun, InvalidData, SecateurError
from secateur.subnetwork import SubNetwork, UnitScores
from secateur.tasks import Task, batches
from secateur.tasks.batching import token_limit
from secateur.train import Objective, Settings, distilled, fit

Value = TypeVar("Value")

STRUCTURED_BUDGETS = frozenset({"macs", "params", "encoder_params", "size", "latency"})
"""What removing heads and neurons can aim at."""

USUAL_BUDGET = "macs<=60%"
"""What it aims at when nothing is asked."""


@dataclass
class Job:
    """What a method works on.

    Attributes:
        model: the model as given; methods leave it unchanged.
        tokenizer: its tokenizer.
        task: data and metric; `train` is what methods may learn or calibrate from.
        constraints: the budget, resolved on this model.
        run: where finished stages are kept.
        batch, tokens: the shape at which MACs and latency count.
        seed: of every random choice.
        show: whether to show progress.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    constraints: Sequence[Constraint]
    run: Run
    batch: int = 1
    tokens: int = 128
    seed: int = 0
    show: bool = False

    def calibration(
        self, count: int, batch_size: int, *, labels: bool = False, max_length: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Seeded batches of training examples, without labels unless asked for.

        Args:
            count: number of batches; fewer if the split is smaller.
            batch_size: examples in a batch.
            labels: keep the labels.
            max_length: tokens beyond this are cut off; those beyond the model's limit if None.

        Raises:
            InvalidData: the task has no training split.
        """
        if self.task.train is None:
            raise InvalidData(f"task '{self.task.name}' has no training rows to calibrate on: add a train file.")
        data = batches(
            self.task,
            "train",
            self.tokenizer,
            batch_size=batch_size,
            max_length=min(max_length or 10**6, token_limit(self.tokenizer, self.model)),
            shuffle=self.seed,
            limit=count * batch_size,
        )
        return [{k: v for k, v in batch.items() if labels or k != "labels"} for batch in data]

    def distillation(self, weight: float) -> Objective | None:
        """The loss with the distance to the job's model at a weight; None for the model's own."""
        return distilled(copy.deepcopy(self.model), weight) if weight else None

    def costs(self, model: PreTrainedModel) -> dict[str, float]:
        """MACs, at the job's shape, and parameters of a changed model, whole, as `Outcome.predicted` has them."""
        full = SubNetwork.full(model)
        return {"macs": macs(model, self.batch, self.tokens).of(full), "params": params(model).of(full)}

    def trained(
        self,
        model: PreTrainedModel,
        settings: Settings,
        callbacks: Sequence[TrainerCallback],
        objective: Objective | None = None,
        stage: str = "training",
    ) -> dict[str, Tensor]:
        """Train a model in place, with checkpoints in the run's folder, if it has one.

        Args:
            model: a changed copy of the job's.
            settings: what decides the result.
            callbacks: what compresses it meanwhile.
            objective: the loss; the model's own if None.
            stage: name of the folder of its checkpoints.

        Returns:
            The weights at the end, by name.
        """
        set_seed(self.seed)
        with tempfile.TemporaryDirectory() as spare:
            folder = Path(spare) if self.run.folder is None else self.run.folder / stage
            fit(
                model,
                self.tokenizer,
                self.task,
                folder,
                settings,
                objective=objective,
                callbacks=callbacks,
                progress=self.show,
            )
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass
class Outcome:
    """What a method hands back: the changed model, the edits that shape it, and what they were chosen by.

    Attributes:
        model: the changed model.
        edits: the changes.
        subnetwork: the heads and neurons that it kept.
        scores: what they were chosen by; None if the method cuts neither.
        predicted: what the cost models say of the model, by kind; None if that follows from the sub-network.
    """

    model: PreTrainedModel
    edits: list[Edit]
    subnetwork: SubNetwork
    scores: UnitScores | None = field(default=None, repr=False)
    predicted: dict[str, float] | None = None


class Method(Protocol):
    """A compression method: a dataclass of hyper-parameters with a `run`.

    Attributes:
        name: its key in `METHODS`.
        budgets: the kinds of budget it can meet.
        usual_budget: what it aims at when nothing is asked.
        cuts_units: whether it removes heads and neurons.
    """

    name: ClassVar[str]
    budgets: ClassVar[frozenset[str]]
    usual_budget: ClassVar[str]
    cuts_units: ClassVar[bool]

    def run(self, job: Job) -> Outcome:
        """Compress `job.model` to `job.constraints`."""
        ...


class Run:
    """Stages of a long computation, each kept on disk when it is done.

    A run that is killed leaves its finished stages; opened again with `resume=True` it hands them back, so it ends
    with the
    same numbers. Files are written to a temporary name and renamed.

    Args:
        folder: where to keep the stages; None keeps nothing.
        identity: what the run depends on (model, task, method, budget, seed). Resuming with another one is an error.
        resume: True to go on from finished stages, False to start anew.

    Raises:
        SecateurError: `resume` and the folder belongs to another run, or there is none.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any], *, resume: bool = False) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        if folder is None:
            return
        marker = folder / "run.json"
        if resume:
            found = read_json(marker) if marker.is_file() else None
            if found is None:
                raise SecateurError(f"There is no unfinished run at '{folder}': run without --resume.")
            changed = sorted(k for k in {*found, *identity} if found.get(k) != json.loads(json.dumps(identity)).get(k))
            if changed:
                raise AnotherRun(
                    f"The run at '{folder}' was started with another {', '.join(changed)}: run without --resume."
                )
        else:
            if folder.exists() and not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
                raise SecateurError(f"'{folder}' is in the way: the run keeps its stages there. Move it.")
            fresh = folder.with_name(f".{folder.name}.new")  # a folder without its marker could not be resumed
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            write_json(fresh / marker.name, identity)
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)

    def tensors(
        self, stage: str, compute: Callable[[], dict[str, Tensor]], *, part_of: str | None = None
    ) -> dict[str, Tensor]:
        """The stage's tensors: computed once, then read back bit by bit.

        Args:
            stage: its name.
            compute: gives the tensors.
            part_of: the name under which the stage's seconds are summed up with those of others; its own if None.
        """

        def read(file: Path) -> dict[str, Tensor]:
            return load_file(file)

        def write(file: Path, value: dict[str, Tensor]) -> None:
            save_file({name: tensor.contiguous() for name, tensor in value.items()}, file)

        value: dict[str, Tensor] = self._stage(stage, ".safetensors", compute, read, write)
        self._sum(stage, part_of)
        return value

    def record(
        self, stage: str, compute: Callable[[], Any], *, part_of: str | None = None, seconds: float | None = None
    ) -> Any:
        """The stage's JSON value: computed once, then read back.

        Args:
            stage: its name.
            compute: gives the value.
            part_of: as for `tensors`.
            seconds: what it took, if it was computed elsewhere.
        """
        value = self._stage(stage, ".json", compute, read_json, write_json, seconds)
        self._sum(stage, part_of)
        return value

    def has(self, stage: str) -> bool:
        """Whether a stage is kept."""
        return self.folder is not None and (self.folder / f"{stage}.seconds").is_file()

    def timed(self, stage: str, compute: Callable[[], Value], *, part_of: str | None = None) -> Value:
        """A value that is not kept, because it belongs to this very process; only its seconds are noted."""
        start = time.perf_counter()
        value = compute()
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        self._sum(stage, part_of)
        return value

    def _sum(self, stage: str, whole: str | None) -> None:
        if whole is not None:
            self.seconds[whole] = round(self.seconds.get(whole, 0.0) + self.seconds.pop(stage), 3)

    def _stage(
        self,
        stage: str,
        suffix: str,
        compute: Callable[[], Any],
        read: Callable[[Path], Any],
        write: Callable[[Path, Any], None],
        spent: float | None = None,
    ) -> Any:
        file = self.folder / f"{stage}{suffix}" if self.folder else None
        clock = self.folder / f"{stage}.seconds" if self.folder else None
        if file is not None and clock is not None and file.is_file() and clock.is_file():
            try:
                value = read(file)
                self.seconds[stage] = float(clock.read_text())
                return value
            except (OSError, ValueError, SafetensorError):
                pass  # damaged: compute it again
        start = time.perf_counter()
        value = compute()
        self.seconds[stage] = round(time.perf_counter() - start if spent is None else spent, 3)
        if file is not None and clock is not None:
            fresh = file.with_suffix(".tmp")
            write(fresh, value)
            os.replace(fresh, file)
            fresh.write_text(str(self.seconds[stage]))
            os.replace(fresh, clock)
        return value

    def close(self) -> None:
        """Forget the stages: the run has ended well."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name, then rename."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))
