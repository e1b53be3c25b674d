"""The report: every number is there, nothing is loaded from anywhere, and text of the user stays text."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from secateur.errors import SecateurError
from secateur.report import numbers, print_report, render, table, write_report
from secateur.report.cuts import histogram
from secateur.report.trade import series_of
from secateur.report.view import block_labels, short_name, views
from secateur.subnetwork import SubNetwork

HEADS = [[0.5, 2.0, 0.1, 0.0], [3.0, 0.2, 0.4, 1.5]]
NEURONS = [[10.0 ** -(i % 7) for i in range(100)], [10.0 ** -(i % 5) for i in range(100)]]
EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png>"


def made(**changes: Any) -> dict[str, Any]:
    """A `result.json` of two layers of 4 heads and 100 neurons."""
    heads = tuple(tuple(score >= 0.4 for score in block) for block in HEADS)
    neurons = tuple(tuple(score >= 0.01 for score in block) for block in NEURONS)
    record: dict[str, Any] = {
        "secateur": "0.1.0",
        "schema": 1,
        "name": "optin 60%",
        "model": "models/minilm-l6-sst2",
        "task": {
            "name": "sst2",
            "kind": "classification",
            "metric": "accuracy",
            "split": "validation",
            "examples": 872,
        },
        "method": {"name": "optin", "lambda_c": 0.1, "temperature": 4.0},
        "budget": {
            "text": "macs<=60%,latency<=8ms",
            "terms": [
                {"kind": "macs", "asked": "60%", "limit": 174_528_921.6, "reached": 174_179_863, "met": True},
                {"kind": "latency", "asked": "8ms", "limit": 8.0, "reached": 8.2, "met": False},
            ],
        },
        "before": {
            "macs": 290_881_536,
            "params": 22_713_986,
            "encoder_params": 10_646_784,
            "bytes": 90_857_144,
            "metrics": {"accuracy": 0.897936, "matthews": 0.79},
            "latency_ms": {"median": 12.3, "p90": 12.9, "n": 120},
        },
        "after": {
            "macs": 174_179_863,
            "params": 18_561_740,
            "encoder_params": 6_494_538,
            "bytes": 74_248_160,
            "metrics": {"accuracy": 0.8876, "matthews": 0.7812},
            "latency_ms": {"median": 8.2, "p90": 8.7, "n": 190},
        },
        "predicted": {"macs": 174_179_863, "latency_ms": 7.954},
        "latency_setting": {"batch": 1, "tokens": 25, "threads": 2, "dtype": "float32"},
        "seconds": {"load": 1.9, "score": 48.2, "search": 0.04, "measure": 125.0},
        "seed": 7,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"cpu": "Example 9000", "cores": 2, "flags": ["avx2", "amx_int8"]},
        "data": {"fingerprint": "9f31c2d47ab0e685"},
        "command": "secateur compress minilm --budget 'macs<=60%'",
        "edits": [{"type": "slice"}],
        "subnetwork": SubNetwork(heads, neurons).to_dict(),
        "blocks": {
            "heads": [f"encoder.layer.{i}.attention.self" for i in range(2)],
            "neurons": [f"encoder.layer.{i}.intermediate" for i in range(2)],
        },
        "scores": {"heads": HEADS, "neurons": NEURONS},
    }
    return {**record, **changes}


class Page(HTMLParser):
    """The parts of a page that tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        {"script": self.scripts, "style": self.styles}.get(self._inside, self.texts).append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    @property
    def figures(self) -> dict[str, Any]:
        start = next(i for i, (tag, attrs) in enumerate(self.tags) if attrs.get("id") == "figures")
        order = sum(1 for tag, _ in self.tags[: start + 1] if tag == "script")
        figures: dict[str, Any] = json.loads(self.scripts[order - 1])
        return figures


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render([made()]))


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        for name in ("src", "srcset", "href", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"@import|url\(", "".join(page.styles))
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_embedded_once(page: Page) -> None:
    assert len([script for script in page.scripts if len(script) > 1_000_000]) == 1
    several = Page(render([made(), made(name="b")]))
    assert len([script for script in several.scripts if len(script) > 1_000_000]) == 1


def test_the_numbers_are_there(page: Page) -> None:
    for expected in (
        "minilm-l6-sst2: 40.1 % fewer MACs, 1.50× faster, accuracy −1.03 points",
        "OPTIN kept 5 of 8 attention heads and 104 of 200 neurons",
        "Budget: macs<=60%,latency<=8ms. Measured on sst2 (validation, 872 examples).",
        "MACs 290.9 M 174.2 M −40.1 %",
        "Parameters 22.71 M 18.56 M −18.3 %",
        "Encoder parameters 10.65 M 6.49 M −39.0 %",
        "Size on disk, float32 90.86 MB 74.25 MB −18.3 %",
        "Latency, median 12.30 ms 8.20 ms 1.50× faster",
        "Latency, 90th percentile 12.90 ms 8.70 ms 1.48× faster",
        "Accuracy 89.79 % 88.76 % −1.03 points",
        "Matthews correlation 0.7900 0.7812 −0.0088",
        "MACs 60% 174.5 M 174.2 M met, 99.8 %",
        "Latency, median 8ms 8.00 ms 8.20 ms missed, 102.5 %",
        "Latency, median 7.95 ms 8.20 ms −3.0 %",
        "MACs and latency: batch 1, tokens 25, threads 2, float32.",
        "secateur compress minilm --budget 'macs<=60%'",
        "optin, lambda_c 0.1, temperature 4",
        "cpu Example 9000, cores 2, flags avx2 amx_int8",
        "fingerprint 9f31c2d47ab0e685",
        "secateur 0.1.0, torch 2.13.0, transformers 5.23.0",
        "score 48.2 s",
        "search 40 ms",
        "measure 2 min 05 s",
        "seed 7",
    ):
        assert expected in page.text, expected


def test_every_chart_has_a_place_and_its_numbers(page: Page) -> None:
    figures = page.figures
    places = {attrs["id"] for tag, attrs in page.tags if attrs.get("class") == "plot"}
    assert set(figures) == places
    assert set(figures) == {
        *("trade-macs-0", "trade-latency-0", "r0-heads", "r0-neurons", "r0-widths"),
        *("r0-scores-heads", "r0-scores-neurons"),
    }
    point, dense = figures["trade-macs-0"]["data"]
    assert point["x"] == [pytest.approx(174.179863)]
    assert point["y"] == [pytest.approx(88.76)]
    assert dense["x"] == [pytest.approx(290.881536)]
    assert dense["marker"]["symbol"] == "star"
    assert figures["trade-latency-0"]["data"][0]["error_x"]["array"] == [pytest.approx(0.5)]
    assert figures["r0-heads"]["data"][0]["z"] == [[1, 1, 0, 0], [1, 0, 1, 1]]
    kept, removed = figures["r0-widths"]["data"]
    assert kept["x"] == [44, 60]
    assert removed["x"] == [56, 40]


def test_neurons_are_shown_as_shares_of_stretches(page: Page) -> None:
    trace = page.figures["r0-neurons"]["data"][0]
    shares = np.array(trace["z"])
    assert shares.shape == (2, 48)
    assert trace["customdata"][0][0] == "0–1"
    assert trace["customdata"][0][-1].endswith("–99")
    assert shares[0, 0] == 1.0  # neurons 0 and 1 score 1 and 0.1
    lengths = [int(b) - int(a) + 1 for a, b in (text.split("–") for text in trace["customdata"][0])]
    assert sum(lengths) == 100
    assert float(np.dot(shares[0], lengths)) == pytest.approx(44, abs=0.02)


def test_histogram_counts_by_hand() -> None:
    values = np.array([1.0, 10.0, 10.0, 100.0, 0.0, -1.0, math.nan])
    kept = np.array([False, False, True, True, False, False, False])
    centres, kept_counts, removed_counts, without = histogram(values, kept, bins=4)
    assert centres == [0.25, 0.75, 1.25, 1.75]
    assert kept_counts == [0, 0, 1, 1]
    assert removed_counts == [1, 0, 1, 0]
    assert without == 3
    assert histogram(np.zeros(3), np.ones(3, dtype=bool)) == ([], [], [], 3)


def test_scores_of_zero_are_mentioned(page: Page) -> None:
    assert "1 with a score of zero or less is not drawn" in page.text


def test_text_of_the_user_stays_text() -> None:
    record = made(name=EVIL, model=EVIL.replace("/", "|"), command=EVIL, machine={EVIL: EVIL}, data={"source": EVIL})
    record["method"] = {"name": EVIL}
    record["task"]["name"] = EVIL
    record["budget"]["text"] = EVIL
    record["blocks"] = {"heads": [EVIL, EVIL + "2"], "neurons": [EVIL, EVIL + "2"]}
    record["seconds"] = {EVIL: 1.0}
    record["after"]["metrics"] = {"accuracy": 0.5, EVIL: 0.1}
    for records in ([record], [record, made()]):
        html = render(records)
        shown = Page(html)
        assert not any(tag == "img" for tag, _ in shown.tags)
        assert len(shown.scripts) == 3
        assert "<script>alert" not in html
        assert "<img" not in html.replace(next(s for s in shown.scripts if len(s) > 1_000_000), "")
        labels = json.dumps(shown.figures)
        assert "<script" not in labels  # plotly would read it as markup
        assert "&lt;script" in labels


def test_a_model_that_lost_no_unit_is_headed_by_what_it_lost() -> None:
    record = made()
    after = record["before"] | {"bytes": 53_977_248}
    for kind, reached, wording in (
        ("sparsity", 0.9, "90.0 % zeros in the layers' maps"),
        ("bits", 1.0, "operands of 1 bits"),
    ):
        terms = [{"kind": kind, "asked": "", "limit": 1.0, "reached": reached, "met": True}]
        (view,) = views(
            [record | {"after": after, "budget": {"text": kind, "terms": terms}, "given_bytes": 45_439_980}]
        )
        assert view.headline == f"minilm-l6-sst2: {wording}, file 40.6 % smaller, accuracy +0.00 points"
        assert view.summary.startswith(
            f"OPTIN: {wording}. The file as given has 45.44 MB, in another precision. Budget"
        )


def test_several_results_are_compared() -> None:
    slow = made(name="ptf 60%", method={"name": "ptf"})
    slow["after"] = {
        **slow["after"],
        "metrics": {"accuracy": 0.91},
        "latency_ms": {"median": 24.6, "p90": 25.0, "n": 9},
    }
    light = made(name="optin 40%")
    light["after"] = {**light["after"], "macs": 116_352_614}
    shown = Page(render([made(), slow, light]))
    assert "3 results for minilm-l6-sst2" in shown.text
    assert shown.text.count("dense minilm-l6-sst2") == 1
    assert (
        "ptf 60% macs<=60%, latency<=8ms 174.2 M 18.56 M 74.25 MB 24.60 ms 2.00× slower 91.00 % +1.21 points"
        in shown.text
    )
    assert {attrs.get("id") for tag, attrs in shown.tags if tag == "section"} == {"r0", "r1", "r2"}
    optin, ptf, dense = shown.figures["trade-macs-0"]["data"]
    assert (optin["name"], ptf["name"], dense["name"]) == ("optin", "ptf", "dense minilm-l6-sst2")
    assert optin["x"] == [pytest.approx(116.352614), pytest.approx(174.179863)]
    assert optin["customdata"] == ["optin 40%", "optin 60%"]


def test_series_are_named_apart() -> None:
    other = made(name="optin exact", method={"name": "optin", "scorer": "exact"})
    series = series_of(views([made(), other, made(name="optin 50%")]))
    assert [series[i].index for i in range(3)] == [0, 1, 0]
    assert [series[i].name for i in range(3)] == ["optin 60%", "optin exact", "optin 60%"]
    elsewhere = series_of(views([made(), made(model="org/bert"), made(method={"name": "ptf"})]))
    assert [elsewhere[i].name for i in range(3)] == ["optin, minilm-l6-sst2", "optin, bert", "ptf"]


def test_tasks_with_different_metrics_get_their_own_charts() -> None:
    other = made(name="stsb", task={"name": "stsb", "metric": "spearman", "split": "validation"})
    for side in ("before", "after"):
        other[side] = {**other[side], "metrics": {"spearman": 0.86}}
    figures = Page(render([made(), other])).figures
    assert [name for name in figures if name.startswith("trade")] == [
        f"trade-{axis}-{number}" for number in (0, 1) for axis in ("macs", "latency", "bytes")
    ]


def test_what_was_not_measured_is_left_out() -> None:
    record = made(subnetwork=None, scores=None, predicted={}, seconds={}, blocks={}, machine={}, data={}, versions={})
    record["before"] = {"macs": 100, "metrics": {}, "latency_ms": {}}
    record["after"] = {"macs": 60, "metrics": {}, "latency_ms": {"median": math.nan}}
    shown = Page(render([record]))
    assert "MACs 100 60 −40.0 %" in shown.text
    assert shown.figures == {}
    assert "nan" not in shown.text.lower()


def test_unreadable_results_are_refused() -> None:
    with pytest.raises(SecateurError, match="no result to report"):
        render([])
    with pytest.raises(SecateurError, match="lacks name, model"):
        render([{"after": {}}])
    with pytest.raises(SecateurError, match="schema 9"):
        render([made(schema=9)])
    with pytest.raises(SecateurError, match="damaged"):
        render([made(before=None)])
    with pytest.raises(SecateurError, match="damaged"):
        render([made(seconds={"load": "long"})])


def test_rendering_changes_nothing_and_repeats() -> None:
    record = made()
    before = copy.deepcopy(record)
    assert render([record]) == render([record])
    assert record == before


def test_write_report_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    assert write_report([made()], target) == target
    first = target.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>")
    with pytest.raises(SecateurError):
        write_report([{"name": "broken"}], target)
    assert target.read_text(encoding="utf-8") == first
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def text_of(records: list[dict[str, Any]], width: int = 100) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        print_report(records, console)
    return captured.get()


def test_terminal_shows_before_and_after() -> None:
    text = text_of([made(name="[red]name[/red]")])
    assert "[red]name[/red]" in text
    for expected in ("40.1 % fewer MACs", "290.9 M", "174.2 M", "−1.03 points", "1.50× faster", "missed", "(−3.0 %)"):
        assert expected in text, expected
    assert table([made()]).row_count == 8


def test_terminal_compares_within_80_columns() -> None:
    text = text_of([made(), made(name="ptf 60%", method={"name": "ptf"})], width=80)
    line = next(line for line in text.splitlines() if "ptf 60%" in line)
    for expected in ("59.9 %", "81.7 %", "74.25 MB", "8.20", "1.50×", "88.76 %", "−1.03"):
        assert expected in line, expected


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"], ["0", "1"]),
        (
            ["encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention"],
            ["encoder 0", "decoder 0"],
        ),
        (
            ["decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"],
            ["0 self_attn", "0 encoder_attn"],
        ),
        (["attention", "other"], ["attention", "other"]),
    ],
)
def test_block_labels(names: list[str], labels: list[str]) -> None:
    assert block_labels(names) == labels


def test_short_names() -> None:
    assert short_name("/home/someone/models/minilm/") == "minilm"
    assert short_name("nyu/bert-base") == "bert-base"
    assert short_name("BertModel") == "BertModel"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (numbers.amount(1_234_567, numbers.unit_of("macs", [1_234_567])), "1.23 M"),
        (numbers.amount(999, numbers.unit_of("params", [999])), "999"),
        (numbers.amount(123.4e9, numbers.unit_of("macs", [123.4e9])), "123.4 G"),
        (numbers.amount(512, numbers.unit_of("bytes", [512])), "512 B"),
        (numbers.amount(None, numbers.unit_of("bytes", [None])), "–"),
        (numbers.share_change(100, 99.99), "0.0 %"),
        (numbers.share_change(100, 120), "+20.0 %"),
        (numbers.share_change(0, 1), "–"),
        (numbers.speed(10, 10.01), "same speed"),
        (numbers.speed(10, 20), "2.00× slower"),
        (numbers.speed(10, None), "–"),
        (numbers.metric_change("accuracy", 0.9, 0.905), "+0.50 points"),
        (numbers.metric_change("spearman", 0.86, 0.85), "−0.0100"),
        (numbers.metric_text("f1", 0.5), "50.00 %"),
        (numbers.seconds_text(0.004), "4 ms"),
        (numbers.seconds_text(4020), "1 h 07 min"),
    ],
)
def test_numbers_as_people_read_them(found: str, expected: str) -> None:
    assert found == expected


def test_sense_follows_what_is_better() -> None:
    assert numbers.cost_sense(10, 9) == "better"
    assert numbers.cost_sense(10, 11) == "worse"
    assert numbers.cost_sense(10, 10.01) == "same"
    assert numbers.metric_sense(0.9, 0.91) == "better"
    assert numbers.metric_sense(0.9, 0.89) == "worse"
