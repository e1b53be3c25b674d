"""Fill the tables of the docs from the kept results: the text between `<!-- begin name -->` and `<!-- end name -->`.

python benchmarks/cards.py
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import engine_quality
import engines
import late_quality
import late_scores
import nas_quality
import optin_quality
from common import HERE, seeds_table

DOCS = HERE.parent / "docs"
SPLITS = ("validation", "test")


def results(name: str) -> dict[str, Any] | None:
    """A kept result, or None."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def optin_tables() -> str:
    """Metric against MACs of every method."""
    records = [record for task in ("sst2", "stsb") if (record := results(f"optin_quality_{task}"))]
    return "\n\n".join(optin_quality.table(record, split) for record in records for split in SPLITS)


def optin_differences() -> str:
    """Paired differences to the dense model, seed by seed."""
    lines = ["| task | split | MACs | OPTIN | PTF scores, same tuning |", "|---|---|---|---|---|"]
    for task in ("sst2", "stsb"):
        record = results(f"optin_quality_{task}")
        for split in SPLITS:
            for budget in optin_quality.BUDGETS:
                cells = [_seeds(record, method, split, budget) for method in ("optin full", "ptf with our tuning")]
                lines.append(f"| {task} | {split} | {budget} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seeds(record: Any, method: str, split: str, budget: int) -> str:
    rows = [row for row in record["rows"] if row["method"] == method and row["budget"] == budget]
    found = [row[f"{split} difference"] for row in sorted(rows, key=lambda row: row["seed"])]
    return "; ".join(f"{100 * d:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for d, low, high in found) or "–"


def late_tables() -> str:
    """Metric against speed-up."""
    tasks = ("stsb", "sst2", "long", "wnut17")
    records = [record for task in tasks if (record := results(f"late_quality_{task}"))]
    return "\n\n".join(late_quality.table(record, split) for record in records for split in SPLITS)


def late_choices() -> str:
    """What the default score and the default ACC are chosen by."""
    return late_scores.tables(results("late_scores") or {"rows": []})


def late_latency() -> str:
    """Measured speed-up beside the one of the MACs."""
    lines = [
        "| model, dtype | input | form | asked | dense ms | ms | measured | of theory | over dense padded |",
        "|---" * 9 + "|",
    ]
    for dtype in ("fp32", "bf16"):
        rows = (results(f"late_latency_{dtype}") or {"rows": []})["rows"]
        dense = {(row["model"], row["case"], row["form"]): row["ms"] for row in rows if row["asked"] == "dense"}
        lines += [
            f"| {row['model']}, {dtype} | {row['case']} | {row['form']} | {row['asked']}× | "
            f"{dense[row['model'], row['case'], row['form']]:.1f} | {row['ms']:.1f} | {row['measured']:.2f}× | "
            f"{row['of theory']:.0%} | {row['over dense padded']:.2f}× |"
            for row in rows
            if row["asked"] != "dense"
        ]
    return "\n".join(lines)


def late_decoder() -> str:
    """Perplexity and time to first token."""
    rows = (results("late_decoder") or {"rows": []})["rows"]
    judged = [row for row in rows if "choice" in row]
    asked = sorted({row["asked"] for row in judged})
    lines = ["| tokens kept | " + " | ".join(f"{k:g}×" for k in asked) + " |", "|---" * (len(asked) + 1) + "|"]
    for choice in dict.fromkeys(row["choice"] for row in judged):
        found = {row["asked"]: row for row in judged if row["choice"] == choice}
        cells = [
            f"{found[k]['following']:.1f} ({_perplexity(found[k]['restored'])})" if k in found else "" for k in asked
        ]
        lines.append(f"| {choice} | " + " | ".join(cells) + " |")
    lines += ["", "| model | prompt | asked | MACs | ms | measured |", "|---" * 6 + "|"]
    lines += [
        f"| {row['model']} | {row['prompt']} | {row['asked']:g}× | {row['theory']:.2f}× | {row['ms']:.0f} | "
        f"{row['faster']:.2f}× |"
        for row in rows
        if "prompt" in row
    ]
    return "\n".join(lines)


def _perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 10_000 else "over 10,000"


def trained(method: str, column: str, head: str) -> str:
    """Metric against a column of the rows, on each task and split."""
    tables = []
    for task in ("stsb", "sst2"):
        if record := results(f"{method}_quality_{task}"):
            columns = sorted({row[column] for row in record["rows"]})
            tables += [seeds_table(record, split, column, columns, head) for split in SPLITS]
    return "\n\n".join(tables)


def bit_start() -> str:
    """How far 1-bit models are from their teacher after few steps."""
    rows = (results("bit_start") or {"rows": []})["rows"]
    lines = ["| bits | settings | first scales by | optimiser | loss of the last steps | metric |", "|---" * 6 + "|"]
    for row in rows:
        chosen = ", ".join(f"{key}={value}" for key, value in row["set"].items() if key != "calibration")
        metric = next(value for key, value in row.items() if key in ("spearman", "accuracy"))
        optimiser = "released" if row["released optimiser"] else "AdamW"
        scales = row.get("calibration by", "the mean")
        lines.append(
            f"| {row['bits']} | `{chosen}` | {scales} | {optimiser} | {row['loss']:.2f} | {100 * metric:.1f} |"
        )
    return "\n".join(lines)


def engines_table() -> str:
    """Engines side by side."""
    record = results("engines")
    return engines.table(record) if record else ""


def engine_quality_table() -> str:
    """Metric of the native engine and of the model."""
    record = results("engine_quality")
    return engine_quality.table(record) if record else ""


def nas_tables() -> str:
    """Fronts by setting, and rivals at as many parameters."""
    records = [record for task in ("stsb", "sst2") if (record := results(f"nas_quality_{task}"))]
    return "\n\n".join(part for record in records for part in nas_quality.both_tables(record))


def mgpp_latency() -> str:
    """Milliseconds with sparse kernels over those of dense products."""
    rows = (results("sparse_latency") or {"rows": []})["rows"]
    cases = list(dict.fromkeys((row["batch"], row["tokens"]) for row in rows))
    lines = ["| shape | zeros | " + " | ".join(f"{batch} x {tokens}" for batch, tokens in cases) + " |"]
    lines.append("|---" * (len(cases) + 2) + "|")
    for key in dict.fromkeys((row["shape"], row["zeros"], row["sparsity"]) for row in rows):
        found = {(r["batch"], r["tokens"]): r for r in rows if (r["shape"], r["zeros"], r["sparsity"]) == key}
        each = [found[case] for case in cases]
        cells = [
            f"{r['dense ms']:.0f} → {r['sparse ms']:.0f} ({r['ratio']:.2f}{'' if r['not dense'] else ', all dense'})"
            for r in each
        ]
        lines.append(f"| {key[0]} | {key[1]}, {key[2]} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


BLOCKS = {
    "methods/optin.md": {"quality": optin_tables, "differences": optin_differences},
    "methods/late.md": {
        "quality": late_tables,
        "choices": late_choices,
        "latency": late_latency,
        "decoder": late_decoder,
    },
    "methods/mgpp.md": {"quality": partial(trained, "mgpp", "sparsity", "{:g} %"), "latency": mgpp_latency},
    "methods/nas.md": {"quality": nas_tables},
    "runtime.md": {"engines": engines_table, "engine-quality": engine_quality_table},
    "methods/bit.md": {"quality": partial(trained, "bit", "bits", "A{:g}"), "start": bit_start},
}


def main() -> None:
    for page, blocks in BLOCKS.items():
        path: Path = DOCS / page
        text = path.read_text("utf-8")
        for name, make in blocks.items():
            pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
            made = make().replace("\\", r"\\")
            text = pattern.sub(rf"\g<1>\n{made}\n\g<2>", text)
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
