"""The commands of fronts: search for one, and cut a point out of it."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from secateur.cli.options import (
    BatchOption,
    JsonOption,
    LabelOption,
    MetricOption,
    Model,
    SeedOption,
    Settings,
    SplitOption,
    TaskOption,
    TextOption,
    ThreadsOption,
    TokenizerOption,
    TokensOption,
    columns_from,
    settings_from,
    show,
    use_threads,
)
from secateur.errors import SecateurError


def search(
    model: Model,
    task: TaskOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("front"),
    method: Annotated[str, typer.Option("--method", "-m", help="nas.")] = "nas",
    objectives: Annotated[
        str,
        typer.Option(
            "--objectives",
            help="error and one or more of macs, params, encoder_params, size, latency, memory, with commas.",
        ),
    ] = "error,params",
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="Limits that the front keeps, such as latency<=10ms.")
    ] = None,
    setting: Settings = None,
    tokenizer: TokenizerOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    metric: MetricOption = None,
    split: SplitOption = None,
    batch: BatchOption = 1,
    tokens: TokensOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train one super-network and search it for a front of sub-networks to pick from (see extract)."""
    from secateur import api
    from secateur.methods import method_of
    from secateur.report import print_report
    from secateur.tasks import load_task

    use_threads(threads)
    chosen = method_of(method, **settings_from(setting))
    front = api.search(
        model,
        chosen,
        task=load_task(task, text=columns_from(text), label=label, metric=metric, seed=seed),
        objectives=objectives,
        budget=budget,
        out=out,
        tokenizer=tokenizer,
        split=split,
        batch=batch,
        tokens=tokens,
        seed=seed,
        resume=resume,
        progress=True,
    )
    record = front.to_dict()
    show(record, as_json, lambda: print_report([record]))
    typer.echo(
        f"wrote {out}: front.json, report.html, supernet/; cut a point out: secateur extract {quote(str(out))} --knee",
        err=True,
    )


def extract(
    front: Annotated[Path, typer.Argument(help="A folder that `secateur search` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("out"),
    point: Annotated[int | None, typer.Option("--point", "-p", help="A point by its number.")] = None,
    best: Annotated[
        str | None, typer.Option("--best", help="The point that errs least within a budget, such as params<=60%.")
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The bend of the front.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Cut a point of a front out: a model folder that plain `from_pretrained` opens."""
    from secateur.front import Front
    from secateur.report.front import keeps

    if (point is not None) + (best is not None) + knee != 1:
        raise SecateurError("Say which point: one of --point NUMBER, --best BUDGET and --knee.")
    found = Front.load(front)
    chosen = found.knee() if knee else found.best(best) if best is not None else found.point(point or 0)
    found.extract(chosen, out)
    record = {"folder": str(out), "point": chosen.number, "error": chosen.error, "costs": dict(chosen.costs)}
    show(record, as_json, lambda: typer.echo(f"{out}: point {chosen.number}, {keeps(chosen)}"))
