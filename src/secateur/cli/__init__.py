"""The command line: parses, calls `secateur.api`, prints. No logic of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import fronts, serving
from secateur.cli.options import (
    BatchOption,
    JsonOption,
    LabelOption,
    MetricOption,
    Model,
    SeedOption,
    Settings,
    SpeedupOption,
    SplitOption,
    TaskOption,
    TextOption,
    ThreadsOption,
    TokenizerOption,
    TokensOption,
    columns_from,
    numbers_text,
    settings_from,
    show,
    speedups_from,
    use_threads,
)
from secateur.errors import SecateurError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 2 something is wrong with what was asked (one line on standard error says what); "
    "3 done, but a measured latency misses its budget; 1 a bug; 130 interrupted.",
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("secateur-demo"),
    as_json: JsonOption = False,
) -> None:
    """Fine-tune MiniLM-L6 on film reviews, cut it to 60 % of its MACs, measure, and write a report."""
    from secateur.demo import run_demo

    record = run_demo(out)
    show(record, as_json, lambda: _print_results([record]))


@app.command()
def finetune(
    model: Model,
    task: TaskOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    tokenizer: TokenizerOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    metric: MetricOption = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 3,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 5e-5,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens beyond this are cut off.")] = 128,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model with a head for a task (AdamW, warm-up, linear decay)."""
    from secateur import api
    from secateur.tasks import load_task

    use_threads(threads)
    data = load_task(task, text=columns_from(text), label=label, metric=metric, seed=seed)
    folder = api.finetune(
        model,
        tokenizer,
        data,
        out,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        resume=resume,
        progress=True,
    )
    metrics = {name: api.evaluate(folder, data, split=name).metrics for name in data.splits() if name != "train"}
    record = {"folder": str(folder), "metrics": metrics}
    show(record, as_json, lambda: typer.echo(f"{folder}: {numbers_text(metrics)}"))


@app.command()
def compress(
    model: Model,
    task: TaskOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("out"),
    method: Annotated[str, typer.Option("--method", "-m", help="See `secateur list`.")] = "optin",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Such as macs<=60%, or latency<=12ms,size<=20MB; for late speedup>=3, for mgpp sparsity>=90%, for bit "
            "bits<=1. The method's usual one by default.",
        ),
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what a run would aim at, without doing it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Cut a fine-tuned model to a budget and write a folder that plain `from_pretrained` opens."""
    from secateur import api
    from secateur.methods import method_of
    from secateur.tasks import load_task

    use_threads(threads)
    chosen = method_of(method, **settings_from(setting))
    data = load_task(task, text=columns_from(text), label=label, metric=metric, seed=seed)
    if dry_run:
        found = api.plan(
            model, chosen, task=data, budget=budget, tokenizer=tokenizer, batch=batch, tokens=tokens, seed=seed
        )
        show(found, as_json, lambda: _print_plan(found))
        return
    result = api.compress(
        model,
        chosen,
        task=data,
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
    record = result.to_dict()
    show(record, as_json, lambda: _print_results([record]))
    typer.echo(f"wrote {out}: the model, README.md, result.json, report.html", err=True)
    missed = [term for term in record["budget"]["terms"] if not term["met"]]
    for term in missed:
        typer.echo(f"secateur: measured {term['kind']} {term['reached']:.4g} misses {term['asked']}", err=True)
    if missed:
        raise typer.Exit(3)


app.command()(fronts.search)
app.command()(fronts.extract)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, task, stages.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("out"),
    threads: ThreadsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the stages of a recipe one after the other, and compare the last model with the first."""
    from secateur import api

    use_threads(threads)
    record = api.run_recipe(recipe, out, resume=resume, progress=True).to_dict()
    show(record, as_json, lambda: _print_results([record]))
    typer.echo(f"wrote {out}: the model, README.md, result.json, report.html, stages/", err=True)


@app.command()
def dial(
    model: Model,
    task: Annotated[str | None, typer.Option("--task", "-t", help="As for compress; without it no metric.")] = None,
    speedup: SpeedupOption = None,
    tokenizer: TokenizerOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    metric: MetricOption = None,
    split: SplitOption = None,
    batch: BatchOption = 1,
    tokens: TokensOption = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to time.")] = 6.0,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each setting of a latency dial costs and scores here; writes dial.json and dial.html."""
    from secateur import api
    from secateur.report import print_dial
    from secateur.tasks import load_task

    use_threads(threads)
    data = load_task(task, text=columns_from(text), label=label, metric=metric, seed=seed) if task is not None else None
    table = api.dial(
        model,
        data,
        speedups=speedups_from(speedup),
        tokenizer=tokenizer,
        split=split,
        batch=batch,
        tokens=tokens,
        seed=seed,
        seconds=seconds,
        progress=True,
    )
    show(table, as_json, lambda: print_dial(table))
    if Path(model).is_dir():
        typer.echo(f"wrote {Path(model) / 'dial.json'} and dial.html", err=True)


@app.command()
def measure(
    model: Model,
    batch: BatchOption = 1,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per example; the length of the model's dial, or 128, by default.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to time.")] = 4.0,
    speedup: SpeedupOption = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time it with sparse kernels too, chosen by measuring them here.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="Compare engines instead, in turns: some of torch,native,onnx,openvino, the first is 1."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count MACs, parameters and bytes of a model, and time it here."""
    from secateur import api
    from secateur.hub import open_any

    use_threads(threads)
    if engine is not None:
        names = [name.strip() for name in engine.split(",") if name.strip()]
        found = api.compare_engines(model, names, batch=batch, tokens=tokens or 128, seconds=seconds)
        show(found, as_json, lambda: _print_engines(found))
        return
    net = open_any(model)

    def at(wanted: float | None) -> dict[str, Any]:
        return api.measure(net, batch=batch, tokens=tokens, seconds=seconds, speedup=wanted, kernels=kernels)

    _show_settings(at, speedups_from(speedup), as_json)


@app.command()
def evaluate(
    model: Model,
    task: TaskOption,
    tokenizer: TokenizerOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    metric: MetricOption = None,
    split: SplitOption = None,
    speedup: SpeedupOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a model on a task."""
    from secateur import api
    from secateur.hub import open_model
    from secateur.tasks import load_task
    from secateur.tasks.heads import head_class

    use_threads(threads)
    data = load_task(task, text=columns_from(text), label=label, metric=metric, seed=seed)
    net = open_model(model, head_class(data), trained=True)

    def at(wanted: float | None) -> dict[str, Any]:
        found = api.evaluate(net, data, tokenizer=tokenizer or model, split=split, progress=True, speedup=wanted)
        return {"task": data.name, "examples": len(found.labels), "metrics": found.metrics}

    _show_settings(at, speedups_from(speedup), as_json)


@app.command()
def export(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; by default <model>/<format>.")
    ] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="onnx or openvino.")] = "onnx",
    tokenizer: TokenizerOption = None,
    speedup: Annotated[float | None, typer.Option(help="Where to turn a latency dial for it; ONNX only.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write ONNX or OpenVINO with dynamic batch and length, and check that it computes the same."""
    from secateur import api

    folder = api.export(model, out, format, tokenizer, speedup=speedup)
    show({"folder": str(folder)}, as_json, lambda: typer.echo(str(folder)))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="result.json and front.json files, or folders that hold one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    as_json: JsonOption = False,
) -> None:
    """Show results and fronts, one or several, on one self-contained HTML page."""
    from secateur.front import read_record
    from secateur.report import write_report

    records = [read_record(path) for path in results]
    path = write_report(records, out)
    show({"report": str(path)}, as_json, lambda: _print_results(records))
    typer.echo(f"wrote {path}", err=True)


app.command()(serving.serve)


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List methods with their settings, budgets, tasks and architectures."""
    from dataclasses import fields

    from secateur.costs.budget import UNITS
    from secateur.families import FAMILIES
    from secateur.methods import METHODS
    from secateur.tasks import PRESETS

    found: dict[str, Any] = {
        "methods": {name: {f.name: f.default for f in fields(cls)} for name, cls in METHODS.items()},
        "budgets": sorted(UNITS),
        "tasks": sorted(PRESETS),
        "architectures": sorted({t for family in FAMILIES.values() for t in family.model_types}),
    }

    def lines() -> None:
        for name, settings in found["methods"].items():
            typer.echo(f"method {name}: " + ", ".join(f"{key}={value}" for key, value in settings.items()))
        for what in ("budgets", "tasks", "architectures"):
            typer.echo(f"{what}: {', '.join(found[what])}")

    show(found, as_json, lines)


@app.command("build-engine")
def build_engine(as_json: JsonOption = False) -> None:
    """Build the native engine into the cache folder, for an image that will have no compiler."""
    from secateur.runtime import build

    record = {"library": str(build.built()), "tier": build.TIERS[build.library().sec_best_tier()]}
    show(
        record, as_json, lambda: typer.echo(f"{record['library']}\nThe best tier of this machine is {record['tier']}.")
    )


def main() -> None:
    """Run the command line; errors that a user can act on are one line and exit code 2."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars for opening and saving a folder would drown ours
    try:
        app()
    except SecateurError as error:
        sys.stderr.write(f"secateur: {error}\n")
        sys.exit(2)
    except OSError as error:
        sys.stderr.write(f"secateur: {error.filename or 'a file'}: {error.strerror or error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_engines(found: dict[str, Any]) -> None:
    setting = "{batch} x {tokens} tokens, {threads} threads".format(**found)
    typer.echo(f"{setting}; how many times as fast as the first; logits beside torch's: cosine, largest difference")
    for name, row in found["engines"].items():
        times, parity = row["latency_ms"], f"{row['cosine']:.5f} {row['difference']:.5f}"
        typer.echo(f"{name:24} {times['median']:9.2f} ms (p90 {times['p90']:.2f})  {row['ratio']:5.2f}x  {parity}")


def _show_settings(at: Callable[[float | None], dict[str, Any]], speedups: list[float] | None, as_json: bool) -> None:
    """Print what is found where the dial stands, or a line for each speed-up (as JSON, one object with `rows`)."""

    def line(record: dict[str, Any]) -> None:
        shown = {key: value for key, value in record.items() if key != "machine"}
        if "kernels" in record:
            shown["kernels"] = {key: value for key, value in record["kernels"].items() if key != "choices"}
        for choice in record.get("kernels", {}).get("choices", ()):
            (out, inputs), where = choice["shape"], choice["kernels"]
            taken = ", ".join(f"{name} to {rows}" for rows, name in where.items())
            typer.echo(f"{len(choice['maps'])} maps of {out} x {inputs}, {choice['sparsity']:.0%} zeros, rows: {taken}")
        typer.echo(numbers_text(shown))

    if speedups is None:
        found = at(None)
        show(found, as_json, lambda: line(found))
        return
    rows = []
    for wanted in speedups:
        rows.append({"speedup": wanted, **at(wanted)})
        if not as_json:
            line(rows[-1])
    if as_json:
        typer.echo(json.dumps({"rows": rows}))


def _print_results(records: list[dict[str, Any]]) -> None:
    from secateur.report import print_report

    print_report(records)


def _print_plan(found: dict[str, Any]) -> None:
    for limit in found["limits"]:
        planned = f", {limit['predicted']:.4g} planned" if "predicted" in limit else ""
        planned = planned or ("" if "steps" in found["setting"] else ", reach not checked")
        named = {"speedup": "macs", "sparsity": "weights of the layers' maps that are not zero"}
        what = named.get(limit["kind"], limit["kind"])
        typer.echo(f"{what}: {limit['before']:.4g} now, at most {limit['limit']:.4g} asked{planned}")
    if found["heads"] is not None:
        typer.echo(f"heads kept if all units mattered alike: {found['heads']}")
        typer.echo(f"neurons kept if all units mattered alike: {found['neurons']}")
    typer.echo(f"setting: {numbers_text(found['setting'])}")
