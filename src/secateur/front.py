"""A Pareto front of sub-networks: what a search gives back, to pick from and to cut out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import hub
from secateur.costs.budget import Budget
from secateur.errors import InvalidBudget, SecateurError
from secateur.optimize.pareto import hypervolume, knee
from secateur.optimize.points import DEAR, ERROR, Point, best_of, front_of
from secateur.prune import Weights, taken
from secateur.report import write_report
from secateur.report.card import front_card
from secateur.results import read_result
from secateur.run import read_json, write_json

SCHEMA = 1
MARK = "front.json"
POINT = "point.json"
NETWORK = "supernet"
POINTS = "points"


@dataclass
class Front:
    """Sub-networks of one super-network, and the record of how they were found (`front.json`).

    Attributes:
        name: short name of the search.
        source: what was searched: a folder, a hub id, or the class of a live model.
        task, method: what was asked, as JSON.
        objectives: what was lessened; "error" is 1 - metric on the rows that candidates were judged by.
        budget: the limits that the front keeps, as text; None if there were none.
        limits: the same by kind, in units, bytes or milliseconds.
        dense: of the model as given, `costs` and `metrics`.
        points: every sub-network that was evaluated, in order.
        judged: of each point of the front, by its number: `metrics` on the rows of `task`, `difference` of the task's
            metric to the model as given (with its 95 % interval, paired bootstrap over examples), and, where latency
            was asked for, `latency_ms` and `speed` (milliseconds of the model as given over these), measured in turns.
        setting: batch, tokens, threads and dtype of MACs and milliseconds.
        blocks: names of the blocks whose heads and neurons a point lists.
        seconds: wall time by stage.
        model: the super-network: a plain model, whose first units are its best.
        tokenizer: its tokenizer.
        weights: of points of the front, by their number, if each was trained by itself; files or tensors.
    """

    name: str
    source: str
    task: dict[str, Any]
    method: dict[str, Any]
    objectives: tuple[str, ...]
    budget: str | None
    limits: dict[str, float]
    dense: dict[str, Any]
    points: list[Point]
    judged: dict[int, dict[str, Any]]
    setting: dict[str, Any]
    blocks: dict[str, list[str]]
    seconds: dict[str, float]
    seed: int
    versions: dict[str, str]
    machine: dict[str, Any]
    data: dict[str, Any]
    command: str
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False, default=None)
    weights: dict[int, Weights] = field(repr=False, default_factory=dict)

    def pareto(self) -> list[Point]:
        """The points that no other one dominates, among those that keep the limits, by rising cost."""
        return pareto_within(self.points, self.objectives, self.limits)

    def best(self, budget: str) -> Point:
        """The point with the least error within a budget and the front's limits; shares are of the model as given.

        Args:
            budget: see `Budget.parse`, such as "params<=60%,latency<=10ms".

        Raises:
            InvalidBudget: it limits what the points do not count, or no point is within it.
        """
        asked = Budget.parse(budget)
        counted = self.dense["costs"]
        for term in asked.terms:
            if term.counts not in counted:
                hint = f": search with the objectives error,{term.kind}" if term.kind in DEAR else ""
                raise InvalidBudget(f"The front counts {', '.join(counted)}, not '{term.kind}'{hint}.")
        limits = {term.counts: term.limit(counted[term.counts]) for term in asked.terms}
        for kind, limit in self.limits.items():
            limits[kind] = min(limit, limits.get(kind, limit))
        best = best_of(self.points, limits)
        if best is None:
            nearest = min(self.points, key=lambda point: point.beyond(limits))
            reached = ", ".join(
                f"{term.kind} {term.show(nearest.costs[term.counts], counted[term.counts])}" for term in asked.terms
            )
            raise InvalidBudget(
                f"None of {len(self.points)} points is within {asked.describe()}: point {nearest.number} comes nearest "
                f"with {reached}."
            )
        return best

    def knee(self) -> Point:
        """The bend of the front: the point farthest below the plane through its extremes."""
        front = self.pareto()
        return front[knee([[point.of(name) for name in self.objectives] for point in front])]

    def point(self, number: int) -> Point:
        """A point by its number.

        Raises:
            SecateurError: there is none.
        """
        for point in self.points:
            if point.number == number:
                return point
        on = ", ".join(str(point.number) for point in self.pareto())
        raise SecateurError(f"There is no point {number}; those of the front are {on}.")

    def extract(self, point: Point | int, out: str | Path | None = None) -> PreTrainedModel:
        """Cut a point out of the super-network.

        Args:
            point: a point, or its number.
            out: folder to write model, tokenizer, model card and `point.json` to, whole or not at all; None writes
                nothing.

        Returns:
            A model of its own, which computes what the point did.

        Raises:
            SecateurError: there is no such point, or it was trained by itself and is not on the front.
        """
        chosen = self.point(point) if isinstance(point, int) else point
        if out is not None:
            hub.check_target(out, POINT, self.source)
        model = taken(self.model, chosen, self.weights)
        if out is not None:
            record = self.to_dict()

            def write(fresh: Path) -> None:
                hub.write_model(fresh, model, self.tokenizer, front_card(record, chosen.to_dict()))
                write_json(fresh / POINT, {"front": record["name"], "model": self.source, **chosen.to_dict()})

            hub.save_folder(out, write)
        return model

    def hypervolume(self) -> float:
        """Share of the box from nothing to the model as given (in error: to 1) that the front dominates."""
        return volumes(self.points, self.objectives, self.dense["costs"], self.limits)[-1]

    def to_dict(self) -> dict[str, Any]:
        """The content of `front.json`."""
        live = ("model", "tokenizer", "source", "weights")
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in live}
        record |= {"objectives": list(self.objectives), "points": [point.to_dict() for point in self.points]}
        record |= {
            "judged": {str(number): value for number, value in self.judged.items()},
            "front": [point.number for point in self.pareto()],
            "trained alone": sorted(self.weights),
            "volumes": volumes(self.points, self.objectives, self.dense["costs"], self.limits),
        }
        return {"secateur": self.versions["secateur"], "schema": SCHEMA, "model": self.source, **record}

    def report(self, path: str | Path) -> Path:
        """Write the self-contained HTML report."""
        return write_report([self.to_dict()], path)

    def save(self, folder: str | Path) -> Path:
        """Write super-network, `front.json` and `report.html` as one folder, whole or not at all."""
        hub.check_target(folder, MARK)
        record = self.to_dict()

        def write(fresh: Path) -> None:
            hub.write_model(fresh / NETWORK, self.model, self.tokenizer)
            for number, own in self.weights.items():
                (fresh / POINTS).mkdir(exist_ok=True)
                save_file(load_file(own) if isinstance(own, Path) else own, fresh / POINTS / f"{number}.safetensors")
            write_json(fresh / MARK, record)
            write_report([{**record, "folder": str(folder)}], fresh / "report.html")

        return hub.save_folder(folder, write)

    @classmethod
    def load(cls, folder: str | Path) -> Front:
        """Open a folder that `save` wrote.

        Raises:
            SecateurError: it is none, or of another version.
        """
        record = read_front(folder)
        place = Path(record["folder"])
        try:
            values = {f.name: record[f.name] for f in fields(cls) if f.name in record and f.name != "model"}
            values |= {"source": record["model"], "objectives": tuple(record["objectives"])}
            values["points"] = [Point.from_dict(point) for point in record["points"]]
            values["judged"] = {int(number): found for number, found in record["judged"].items()}
            values["weights"] = {n: place / POINTS / f"{n}.safetensors" for n in map(int, record["trained alone"])}
            if gone := [file.name for file in values["weights"].values() if not file.is_file()]:
                raise KeyError(gone[0])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SecateurError(f"'{folder}' is damaged ({type(error).__name__} {error}): search again.") from None
        network = place / NETWORK
        try:
            return cls(**values, model=hub.open_any(network), tokenizer=hub.open_tokenizer(network))
        except TypeError as error:
            raise SecateurError(f"'{folder}' is damaged ({error}): search again.") from None


def pareto_within(points: list[Point], objectives: tuple[str, ...], limits: Mapping[str, float]) -> list[Point]:
    """The front of the points that keep some limits.

    Raises:
        InvalidBudget: none does.
    """
    kept = [point for point in points if point.beyond(limits) <= 0]
    if not kept:
        raise InvalidBudget(f"None of {len(points)} candidates keeps the limits: raise evaluations, or allow more.")
    return front_of(kept, objectives)


def volumes(
    points: list[Point], objectives: tuple[str, ...], dense: Mapping[str, float], limits: Mapping[str, float]
) -> list[float]:
    """Share of the box from nothing to the dense model's costs, and to an error of 1, that points within limits cover.

    Returns:
        The share after each evaluation.
    """
    reference = [1.0 if name == ERROR else 1.0 + 1e-9 for name in objectives]
    front: list[list[float]] = []
    found = [0.0]
    for point in points:
        here = [point.of(name) / (1.0 if name == ERROR else dense[name]) for name in objectives]
        if point.beyond(limits) > 0 or any(all(a <= b for a, b in zip(other, here, strict=True)) for other in front):
            found.append(found[-1])
            continue
        front = [other for other in front if any(a < b for a, b in zip(other, here, strict=True))] + [here]
        found.append(round(hypervolume(front, reference), 6))
    return found[1:]


def read_record(path: str | Path) -> dict[str, Any]:
    """The content of a `front.json` or a `result.json`, or of the one in a folder.

    Raises:
        SecateurError: there is none, or it has another schema.
    """
    place = Path(path)
    return read_front(path) if MARK in (place.name, *(f.name for f in place.glob(MARK))) else read_result(path)


def read_front(path: str | Path) -> dict[str, Any]:
    """The content of a `front.json`, or of the one in a folder.

    Raises:
        SecateurError: there is none, or it has another schema.
    """
    file = Path(path) / MARK if Path(path).is_dir() else Path(path)
    try:
        record = read_json(file)
    except (OSError, ValueError) as error:
        raise SecateurError(f"'{path}' is no front: expected a {MARK} ({type(error).__name__}).") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or "points" not in record:
        raise SecateurError(f"'{file}' is no front of this version (schema {SCHEMA}).")
    return {**record, "folder": str(file.parent)}
