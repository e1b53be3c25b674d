"""What a service reads and writes: requests, answers, metrics."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.errors import InvalidData, MissingExtra, SecateurError
from secateur.serving.batching import Example
from secateur.serving.metrics import Histogram, Metrics
from secateur.serving.reading import Reader, Writer
from secateur.serving.refusals import Refused, extra
from secateur.serving.service import Settings
from tests.unit import tiny_text


def reader(**changes: Any) -> Reader:
    plan = SimpleNamespace(longest=8, words=torch.zeros(20, 4), types=torch.zeros(2, 4), padding=0)
    words = tiny_text.tokenizer()
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    engine: Any = SimpleNamespace(plan=plan, tokenizer=words)
    vars(engine).update(changes)
    return Reader(engine, 3)


def body(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_texts_and_pairs_become_ids() -> None:
    """[CLS] 2, [SEP] 3, good 4, film 11."""
    found = reader().examples(body({"texts": ["good film", ["film", "good"], "good " * 20]}))
    assert [example.ids for example in found] == [[2, 4, 11, 3], [2, 11, 3, 4, 3], [2, 4, 4, 4, 4, 4, 4, 3]]
    assert found[1].types == [0, 0, 0, 1, 1]
    assert reader().examples(body({"ids": [[2, 4, 3], [19]]})) == [Example([2, 4, 3]), Example([19])]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 200_000, "no JSON"),
        (b"1" * 5000, "no JSON"),
        (body([1]), "Send {"),
        (body({}), "Send {"),
        (body({"texts": ["a"], "ids": [[5]]}), "one of them and nothing else"),
        (body({"text": "good"}), "one of them and nothing else"),
        (body({"texts": "good"}), "at least one example"),
        (body({"texts": []}), "at least one example"),
        (body({"texts": [["a", "b", "c"]]}), "texts, or pairs of them"),
        (body({"texts": ["a", 5]}), "texts, or pairs of them"),
        (body({"texts": [None]}), "texts, or pairs of them"),
        (body({"texts": [[["a"], "b"]]}), "texts, or pairs of them"),
        (b'{"texts": ["\\ud800"]}', "does not read a text"),
        (body({"ids": [5]}), "lists of whole numbers"),
        (body({"ids": [[5, 5.5]]}), "lists of whole numbers"),
        (body({"ids": [[5, True]]}), "lists of whole numbers"),
        (body({"ids": [[]]}), "1 to 8 tokens"),
        (body({"ids": [[5] * 9]}), "1 to 8 tokens"),
        (body({"ids": [[20]]}), "ids go from 0 to 19"),
        (body({"ids": [[-1]]}), "ids go from 0 to 19"),
        (body({"ids": [[10**30]]}), "ids go from 0 to 19"),
        (body({"ids": [[5, 0]]}), r"Leave padding \(0\) out"),
    ],
)
def test_bad_requests(given: bytes, message: str) -> None:
    with pytest.raises(InvalidData, match=message) as error:
        reader().examples(given)
    assert "\n" not in str(error.value)


def test_too_many_examples_and_no_tokenizer() -> None:
    with pytest.raises(Refused, match="4 examples are too many for one request: send 3 at most") as error:
        reader().examples(body({"ids": [[5]] * 4}))
    assert error.value.status == 413
    with pytest.raises(InvalidData, match="send token ids"):
        reader(tokenizer=None).examples(body({"texts": ["good"]}))


def config(labels: int, kind: str | None = None) -> Any:
    return SimpleNamespace(num_labels=labels, id2label={i: f"l{i}" for i in range(labels)}, problem_type=kind)


def test_predictions_of_every_kind() -> None:
    """Logits 0 and ln 3: odds of 1 to 3, and sigmoids 1/2 and 3/4."""
    example, logits = Example([5, 6]), torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    found = Writer(config(2)).prediction(example, logits)
    assert found["label"] == "l1"
    assert found["scores"] == pytest.approx({"l0": 0.25, "l1": 0.75})
    assert found["logits"] == logits.tolist()
    several = Writer(config(2, "multi_label_classification")).prediction(example, logits)
    assert several["scores"] == pytest.approx({"l0": 0.5, "l1": 0.75})
    assert Writer(config(1)).prediction(example, torch.tensor([2.5])) == {"logits": [2.5], "value": 2.5}
    numbers = Writer(config(2, "regression")).prediction(example, torch.tensor([2.5, 1.0]))
    assert numbers == {"logits": [2.5, 1.0], "values": {"l0": 2.5, "l1": 1.0}}
    tokens = Writer(config(2)).prediction(example, torch.tensor([[9.0, 0.0], [0.0, 9.0]]))["tokens"]
    assert [(token["id"], token["label"]) for token in tokens] == [(5, "l0"), (6, "l1")]
    extreme = Writer(config(2)).prediction(example, torch.tensor([-2e4, 2e4]))
    assert extreme["scores"] == {"l0": 0.0, "l1": 1.0}


def test_histograms_count_up_to_each_bound() -> None:
    made = Histogram((1, 2.5))
    for value in (0.5, 1, 2, 9):
        made.add(value)
    assert list(made.lines("x")) == [
        'x_bucket{le="1"} 2',
        'x_bucket{le="2.5"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 12.5",
        "x_count 4",
    ]


def test_metrics_in_the_text_format() -> None:
    made = Metrics()
    for status in (200, 200, 429):
        made.request(status)
    made.batch(3, 40)
    made.answer(0.02)
    lines = made.text({"queue_tokens": 7, "speedup": 1.5}).splitlines()
    assert {
        'secateur_requests_total{status="200"} 2',
        'secateur_requests_total{status="429"} 1',
        "secateur_rejected_total 1",
        "secateur_tokens_total 40",
        'secateur_batch_examples_bucket{le="4"} 1',
        'secateur_latency_seconds_bucket{le="0.02"} 1',
        "secateur_latency_seconds_sum 0.02",
        "secateur_queue_tokens 7",
        "secateur_speedup 1.5",
    } <= set(lines)
    assert [line.split()[2:] for line in lines if line.startswith("# TYPE")] == [
        ["secateur_requests_total", "counter"],
        ["secateur_rejected_total", "counter"],
        ["secateur_tokens_total", "counter"],
        ["secateur_batch_examples", "histogram"],
        ["secateur_latency_seconds", "histogram"],
        ["secateur_queue_tokens", "gauge"],
        ["secateur_speedup", "gauge"],
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is at least 1"),
        ({"linger_ms": -1.0}, "linger_ms is not negative"),
        ({"max_wait_ms": -1.0}, "max_wait_ms is not negative"),
        ({"target_ms": 0.0}, "target_ms is above 0"),
        ({"floor": 0.8}, "A floor limits how far a target turns the dial"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Settings(**given)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"needs absent_module: install secateur\[serve\]"):
        extra("absent_module", "serve")
