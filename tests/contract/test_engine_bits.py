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
from tests.contract.test_engine_tokens import dialled
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


def attached_cut(family: str, how: str) -> Any:
    """A tiny model that is "bypassed", or sliced in one of the ways of `CUTS`, with its edit."""
    model: Any = tiny_model(family)
    if how == "bypassed":
        return cut_out(model, cut(model, "layer without both"))
    edit = Slice(cut(model, how))
    apply_edits(model, [edit])
    secateur.hub.attach(model, [edit])
    return model


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
@pytest.mark.parametrize("neurons", [640, 600])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_one_bit_behind_an_activation(activation: str, neurons: int, tier: str) -> None:
    """Levels that change on both sides of the dip of GELU, in it, never, and at 0; few rows and many."""
    model = wide_model(hidden_size=64, intermediate_size=neurons, num_hidden_layers=1, hidden_act=activation)
    model = binary(model, relu=activation == "relu")
    layer = model.bert.encoder.layer[0]
    rounding = layer.output.dense.input_bits
    turns = torch.tensor([0.6, 0.05, 0.002, -0.01, -0.1, -0.16, -0.3, 0.0])
    with torch.no_grad():
        step = 0 if rounding.levels.is_sign else rounding.alpha / 2
        rounding.shift.copy_((turns - step).repeat(len(rounding.shift) // len(turns)))
        layer.intermediate.dense.weight.mul_(8)
    for lengths in ([20], [20, 30, 9]):
        check(model, tier, lengths)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("hidden", "neurons"), [(64, 640), (128, 64)])
def test_threads_do_not_meet(hidden: int, neurons: int, tier: str) -> None:
    """Maps of 64 inputs, whose panels are the smallest, and few rows: what threads spread signs out into is apart."""
    model = binary(wide_model(hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=2))
    for rows in (examples([1]), examples([20])):
        with load(model, tier=tier, threads=1) as engine:
            wanted = engine(rows)
            for engine.threads in (2, 4):
                assert all(torch.equal(engine(rows), wanted) for _ in range(20))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", ["bypassed", *CUTS])
def test_every_cut(how: str, tier: str) -> None:
    check(binary(attached_cut("bert", how)), tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("some", ["maps", "operands"])
def test_the_rest_stays_floats(some: str, tier: str) -> None:
    """A query map and the second layer are binary; of attention, only what is multiplied with each other."""
    model: Any = tiny_model("bert")
    first = "encoder.layer.0.attention.self.query"
    wanted = {"maps": lambda site: site == first or "layer.1" in site, "operands": lambda site: ":" in site}[some]
    sites = filter(wanted, secateur.edits.binarize.places(model))
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


# --- token elimination ------------------------------------------------------------------------------------------------


def check_dial(model: Any, lengths: list[int]) -> None:
    """In every tier the tokens stay that stay in the model: another one would move logits by far more."""
    rows = examples(lengths)
    wanted = alone(packed_twin(model), rows)
    assert (wanted - alone(model, rows)).abs().max() <= 1e-6
    with model.secateur.at(0.0):
        assert (wanted - alone(model, rows)).abs().max() > 0.01
    for tier in TIERS:
        with load(model, tier=tier) as engine:
            assert engine.precision == "1bit"
            assert engine.speedup == pytest.approx(model.secateur.speedup)
            assert (engine(rows) - wanted).abs().max() <= 1e-5, tier


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("family", [family for family in PLANNED if family != "modernbert"])
def test_every_family_with_a_dial(family: str, bits: int) -> None:
    check_dial(dialled(binary(tiny_model(family), bits)), [9, 1, 30, 4, 2, 17])


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("how", ["bypassed", *CUTS])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_every_cut_with_a_dial(family: str, how: str, bits: int) -> None:
    """Layers may have lost all heads: their first tokens stay."""
    check_dial(dialled(binary(attached_cut(family, how), bits)), [9, 1, 30, 4])


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "attention"},
        {"diagonal": True},
        {"beta": 0.5, "weighting": "attention", "diagonal": True},
        {"protected": 3, "recent": 2},
        {"queries": 3, "beta": 0.3},
        {"profile": (1.0, 0.5, 0.5)},
        {"profile": (0.05, 0.05, 0.05)},
        {"steeper": (0.4, 0.2, 0.1), "alpha": 1.5},
    ],
    ids=str,
)
def test_every_way_to_score(changes: dict[str, Any], bits: int) -> None:
    check_dial(dialled(binary(wide_model(), bits), **changes), [40, 1, 7, 129, 300])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [32, 24])
def test_real_widths_with_a_dial(width: int, bits: int) -> None:
    """Scores of heads that go through tiles and of others; at each setting, by one thread and by two."""
    model = wide_model(hidden_size=192, num_attention_heads=192 // width, num_hidden_layers=2)
    model = dialled(binary(model, bits), profile=(0.6, 0.2))
    rows = examples([9, 1, 17, 64, 33, 2, 128])
    for tier in TIERS:
        with load(model, tier=tier, threads=1) as engine:
            for speedup in (1.0, 2.0, 1.3):
                engine.speedup = model.secateur.speedup = speedup
                found = engine(rows)
                # a norm that is summed in another order may turn single levels of so many
                assert ((found - alone(model, rows)).abs().amax(dim=1) <= 1e-4).sum() >= len(rows) - 1, tier
                engine.threads = 2
                assert torch.equal(engine(rows), found)
                engine.threads = 1


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_tokens_that_went_keep_their_last_states(family: str, bits: int) -> None:
    torch.manual_seed(0)
    model = dialled(binary(AutoModelForTokenClassification.from_config(tiny_model(family).config), bits))
    rows, twin = examples([9, 1, 30, 4]), packed_twin(model)
    wanted = [alone(twin, [row])[0] for row in rows]
    for tier in TIERS:
        with load(model, tier=tier) as engine:
            assert all((a - b).abs().max() <= 1e-5 for a, b in zip(engine(rows), wanted, strict=True))


def test_a_folder_opens_with_bits_and_dial(tmp_path: Any) -> None:
    """In either order of the two; the dial turns between calls."""
    rows = examples([9, 31, 5, 1])
    for number, model in enumerate((dialled(binary(wide_model())), binary(dialled(wide_model())))):
        model.secateur.speedup = 1.6
        model.save_pretrained(tmp_path / str(number))
        with load(tmp_path / str(number)) as engine:
            assert engine.speedup == pytest.approx(model.secateur.speedup)
            assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-5
            for speedup in (1.0, 2.5):
                engine.speedup = model.secateur.speedup = speedup
                assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-5


# --- folders ----------------------------------------------------------------------------------------------------------


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
