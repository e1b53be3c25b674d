"""Contract of binary models in the engine: the logits of the twin on whole numbers, in every tier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification

import secateur
from secateur.bits.integer import packed_twin
from secateur.edits import Slice, apply_edits
from secateur.errors import SecateurError
from secateur.runtime import load
from secateur.runtime.plan import FAMILIES as PLANNED
from tests.conftest import tiny_batch, tiny_model
from tests.contract.test_bypass import cut_out
from tests.contract.test_engine import TIERS, alone, examples, wide_model
from tests.contract.test_families import CUTS, cut

LENGTHS = [9, 1, 17, 4]


def batch() -> dict[str, torch.Tensor]:
    return tiny_batch("bert", length=12)


def binary(model: Any, bits: int = 1, **settings: Any) -> Any:
    """A calibrated binary model whose shifts are not 0."""
    secateur.binarize(model, [batch()], bits, **settings)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("input_bits.shift"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    return model.eval()


def check(model: Any, tier: str, lengths: list[int] = LENGTHS) -> None:
    """Another level anywhere would show: logits are equal but for the order of sums in norms and head."""
    rows = examples(lengths)
    with load(model, tier=tier) as engine:
        assert engine.precision == "1bit"
        assert (engine(rows) - alone(packed_twin(model), rows)).abs().max() <= 1e-5


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("family", [family for family in PLANNED if family != "modernbert"])
def test_every_family(family: str, bits: int, tier: str) -> None:
    check(binary(tiny_model(family), bits), tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"embeddings": "float"},
        {"embeddings": "int8"},
        {"rows": True},
        {"two_sets": False, "bits": 2},
        {"relu": False, "bits": 8},
        {"mixed": {"layer.0": 8, ":probs": 4}},
    ],
    ids=str,
)
def test_every_setting(settings: dict[str, Any], tier: str) -> None:
    check(binary(tiny_model("bert"), **settings), tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [32, 24])
def test_real_widths(width: int, bits: int, tier: str) -> None:
    """Heads that go through tiles and others, several panels of outputs, long examples, two threads."""
    model = wide_model(hidden_size=192, num_attention_heads=192 // width, num_hidden_layers=2)
    model = binary(model, bits)
    rows = examples([9, 1, 17, 64, 33, 2, 128])
    with load(model, tier=tier, threads=1) as engine:
        found = engine(rows)
        # a norm that is summed in another order may turn single levels of so many
        assert ((found - alone(packed_twin(model), rows)).abs().amax(dim=1) <= 1e-4).sum() >= len(rows) - 1
        engine.threads = 2
        assert torch.equal(engine(rows), found)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", ["bypassed", *CUTS])
def test_every_cut(how: str, tier: str) -> None:
    model: Any = tiny_model("bert")
    if how == "bypassed":
        model = cut_out(model, cut(model, "layer without both"))
    else:
        edit = Slice(cut(model, how))
        apply_edits(model, [edit])
        secateur.hub.attach(model, [edit])
    check(binary(model), tier)


@pytest.mark.parametrize("tier", TIERS)
def test_some_maps_stay_floats(tier: str) -> None:
    model: Any = tiny_model("bert")
    first = "encoder.layer.0.attention.self.query"
    sites = [site for site in secateur.edits.binarize.places(model) if site == first or "layer.1" in site]
    edit = secateur.edits.Binarize(dict.fromkeys(sites, 4))
    apply_edits(model, [edit])
    secateur.bits.modules.calibrate(model, [batch()])
    secateur.hub.attach(model, [edit])
    check(model.eval(), tier)


@pytest.mark.parametrize("tier", TIERS)
def test_tokens_are_classified(tier: str) -> None:
    torch.manual_seed(0)
    model = binary(AutoModelForTokenClassification.from_config(tiny_model("bert").config), 4)
    rows, twin = examples(LENGTHS), packed_twin(model)
    with load(model, tier=tier) as engine:
        for logits, row in zip(engine(rows), rows, strict=True):
            assert (logits - alone(twin, [row])[0]).abs().max() <= 1e-5


def test_a_folder_opens_in_its_bits(tmp_path: Any) -> None:
    """Weights take an eighth of a byte each, words as stored; a precision is refused."""
    model = binary(wide_model(vocab_size=4000, hidden_size=256, intermediate_size=512, num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    rows = examples([5, 9])
    with load(tmp_path) as engine:
        assert torch.allclose(engine(rows), alone(model, rows), atol=1e-5)
        weights = 2 * (4 * 256 * 256 + 2 * 256 * 512)
        assert weights / 8 <= engine.info()["bytes"] <= weights / 8 + 2 * 4 * 12 * 1600
        assert engine.info()["table_bytes"] <= 4000 * (256 / 8 + 4) + 4 * 256 * 520
    with pytest.raises(SecateurError, match="is binary and runs on the bits"):
        load(tmp_path, "int8")
    with pytest.raises(SecateurError, match="is not binary"):
        load(wide_model(), "1bit")
