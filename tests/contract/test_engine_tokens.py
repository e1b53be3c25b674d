"""Contract of token elimination in the engine: the logits of the model at every setting of its dial, in every tier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification

import secateur
from secateur.edits import DropTokens, apply_edits
from secateur.edits.tokens import dial_of
from secateur.errors import InvalidBudget, SecateurError
from secateur.runtime import Precision, load
from secateur.runtime.plan import FAMILIES as PLANNED
from tests.conftest import tiny_model
from tests.contract.test_engine import NATIVE, TIERS, alone, cosine, cut_model, examples, wide_model
from tests.contract.test_engine_modern import modern
from tests.contract.test_families import CUTS

LENGTHS = [9, 1, 30, 4, 2]


def dialled(model: Any, **changes: Any) -> Any:
    """The model with a dial that eliminates in every layer."""
    settings: dict[str, Any] = dict(profile=(0.8, 0.5, 0.3), tokens=32, alpha=1.0)
    edit = DropTokens(**settings | changes)
    apply_edits(model, [edit])
    secateur.hub.attach(model, [edit])
    return model


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", ["dense", "bypassed", *CUTS])
@pytest.mark.parametrize("family", PLANNED)
def test_every_family_and_cut(family: str, how: str, tier: str) -> None:
    model = dialled(cut_model(family, how))
    rows = examples(LENGTHS)
    with load(model, "fp32", tier=tier) as engine:
        assert engine.speedup > 1
        assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-4


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "attention"},
        {"diagonal": True},
        {"beta": 0.5},
        {"beta": 0.5, "weighting": "attention", "diagonal": True},
        {"protected": 3, "recent": 2},
        {"queries": 2},
        {"queries": 3, "diagonal": True, "beta": 0.3},
        {"profile": (1.0, 0.5, 0.5)},
        {"profile": (0.05, 0.05, 0.05)},
        {"steeper": (0.4, 0.2, 0.1), "alpha": 1.5},
    ],
    ids=str,
)
def test_every_way_to_score(changes: dict[str, Any], tier: str) -> None:
    model = dialled(wide_model(), **changes)
    rows = examples([40, 1, 7, 129, 300])
    with load(model, "fp32", tier=tier) as engine:
        assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-4


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_tokens_that_went_keep_their_last_states(family: str, tier: str) -> None:
    torch.manual_seed(0)
    model = dialled(AutoModelForTokenClassification.from_config(tiny_model(family).config).eval())
    rows = examples(LENGTHS)
    with load(model, "fp32", tier=tier) as engine:
        for logits, row in zip(engine(rows), rows, strict=True):
            assert (logits - alone(model, [row])[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", PLANNED)
def test_few_queries_score_a_long_example(family: str, tier: str) -> None:
    """4 queries of one of more than 16 tokens; all of a shorter one."""
    model = dialled(tiny_model(family), queries=4)
    rows = examples([30, 16, 17, 3])
    with load(model, "fp32", tier=tier) as engine:
        assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-5


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("queries", [4, 64])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_windows_and_long_examples(pooling: str, queries: int, tier: str) -> None:
    """Local layers, in which few queries score and most tokens get exactly nothing: the earlier ones stay."""
    model = dialled(modern(local_attention=16, classifier_pooling=pooling), queries=queries)
    rows = examples([300, 17, 90, 5])
    with load(model, "fp32", tier=tier) as engine:
        assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-4


@pytest.mark.parametrize("tier", NATIVE)
@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.999), ("int8", 0.998)])
@pytest.mark.parametrize("width", [32, 24])
def test_precisions(tier: str, precision: Precision, least: float, width: int) -> None:
    """Scores are rounded too, and random attention is nearly even: here and there another token stays."""
    model = dialled(wide_model(hidden_size=192, num_attention_heads=192 // width))
    rows = examples([9, 1, 17, 64, 33, 2, 128])
    with load(model, precision, tier=tier) as engine:
        assert cosine(engine(rows), alone(model, rows)) >= least


@pytest.mark.parametrize("tier", TIERS)
def test_the_dial_turns_between_calls(tier: str) -> None:
    """At each setting the model's own logits, alone or in a batch, by one thread or two."""
    model = dialled(wide_model(), alpha=0.0)
    rows = examples([31, 5, 70, 1, 200, 90, 90])
    with load(model, "fp32", tier=tier, threads=1) as engine:
        for speedup in (1.0, 2.5, 1.3, 1.0):
            engine.speedup = dial_of(model).speedup = speedup
            assert engine.speedup == pytest.approx(dial_of(model).speedup, abs=1e-9)
            assert engine.info()["speedup"] == engine.speedup >= speedup
            found = engine(rows)
            assert (found - alone(model, rows)).abs().max() <= 1e-4
            assert (found - torch.cat([engine([row]) for row in rows])).abs().max() <= 1e-5
            engine.threads = 2
            assert torch.equal(engine(rows), found)
            engine.threads = 1
        assert engine.reach == pytest.approx(dial_of(model).reach)


def test_settings_that_cannot_be() -> None:
    with load(dialled(wide_model()), "fp32") as engine:
        with pytest.raises(InvalidBudget, match="beyond this model's reach at 32 tokens"):
            engine.speedup = 1000.0
        with pytest.raises(SecateurError, match="at least 1"):
            engine.speedup = 0.5
    with load(wide_model(), "fp32") as engine:
        assert engine.speedup == engine.reach == 1
        with pytest.raises(SecateurError, match="no dial"):
            engine.speedup = 2.0


@pytest.mark.parametrize("tier", TIERS)
def test_a_dial_that_was_never_attached_is_the_models_too(tier: str) -> None:
    """Attaching an edit is for saving: a live model eliminates without, and so does its engine."""
    model: Any = tiny_model("bert")
    apply_edits(model, [DropTokens(profile=(0.8, 0.5, 0.3), tokens=32, alpha=1.0)])
    rows = examples(LENGTHS)
    with load(model, "fp32", tier=tier) as engine:
        assert engine.speedup == model.secateur.speedup > 1.2
        assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-5
