"""Contract of `Binarize`: every family reopens bit-exact and runs on whole numbers; bad folders are refused."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
)

import secateur
from secateur import hub
from secateur.bits.integer import Operand, PackedLinear, bits_by_table, by_table, product, thresholds
from secateur.bits.modules import SAMPLE, AttentionBits, BinaryLinear, Quantizer, _Calibration, calibrate, quantizers
from secateur.bits.quantizers import Levels, to_levels
from secateur.edits import DropTokens, apply_edits
from secateur.edits.binarize import Binarize, places
from secateur.errors import InvalidModel, SecateurError, UnsupportedModel
from secateur.families import FAMILIES
from secateur.tokens.attention import attention
from secateur.tokens.specs import TOKEN_SPECS
from secateur.tokens.state import CURRENT, Pass, Selection
from tests.conftest import BERT, tiny_batch, tiny_model
from tests.contract.test_families import cut
from tests.contract.test_round_trip import auto_class, edit_config
from tests.contract.test_tokens import ragged

BINARY = [name for name, family in FAMILIES.items() if family.plain_products]


def binary(family: str = "bert", bits: int = 1, **settings: Any) -> Any:
    """A tiny binary model, calibrated, whose shifts are not 0."""
    if FAMILIES[family].modality == "image":
        settings = {"embeddings": "float", **settings}
    model: Any = tiny_model(family)
    secateur.binarize(model, [tiny_batch(family, seed=5)], bits, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for quantizer in quantizers(model):
            if quantizer.shift is not None:
                quantizer.shift.copy_(0.1 * torch.randn(quantizer.shift.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("family", BINARY)
def test_it_reopens_bit_exact_and_runs_on_whole_numbers(family: str, bits: int, tmp_path: Path) -> None:
    model, batch = binary(family, bits), tiny_batch(family)
    wanted = logits(model, batch)
    assert bool(wanted.isfinite().all())
    assert torch.equal(logits(secateur.packed_twin(model), batch), wanted)
    model.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), wanted)
    assert hub.edits_of(again) == hub.edits_of(model)
    again.save_pretrained(tmp_path / "again")
    one, other = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for module in model.modules():
        if isinstance(module, BinaryLinear):
            assert set((module.signs()[0]).unique().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": True, "embeddings": "int8"},
        {"two_sets": False, "embeddings": "float"},
        {"relu": False},
        {"calibration": "search"},
        {"calibration": "analytic", "bits": 4},
        {"bits": 8, "mixed": {r"layer\.0\..*:": 4, r"layer\.1\.output": 2, r"layer\.2\.intermediate": 1}},
    ],
)
def test_options(settings: dict[str, Any], tmp_path: Path) -> None:
    model, batch = binary("bert", **settings), tiny_batch("bert")
    wanted = logits(model, batch)
    assert torch.equal(logits(secateur.packed_twin(model), batch), wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hub.open_any(tmp_path), batch), wanted)
    (edit,) = hub.edits_of(model)
    assert isinstance(edit, Binarize)
    if "mixed" in settings:
        assert edit.bits["encoder.layer.0.attention.self:probs"] == 4
        assert edit.bits["encoder.layer.1.output.dense"] == 2
        assert edit.bits["encoder.layer.2.intermediate.dense"] == 1
        assert edit.bits["encoder.layer.1.intermediate.dense"] == 8
    if settings.get("relu", True):
        assert all(type(layer.intermediate.intermediate_act_fn) is torch.nn.ReLU for layer in model.bert.encoder.layer)
    levels = model.bert.encoder.layer[0].output.dense.input_bits.levels
    assert levels.signed == (not settings.get("relu", True) or not settings.get("two_sets", True))


@pytest.mark.parametrize("how", ["float", "int8"])
def test_what_an_edit_does_not_name_is_plain_again(how: Any, tmp_path: Path) -> None:
    model, batch = binary("bert"), tiny_batch("bert")
    secateur.binarize(model, [batch], 2, embeddings=how, relu=False)
    edit = Binarize({"encoder.layer.0.output.dense": 4}, how)
    for change, binary_maps in ((None, 19), (edit, 1)):
        if change is not None:
            secateur.apply_edits(model, [change])
            calibrate(model, [batch])
            hub.attach(model, [change])
        assert sum(isinstance(module, BinaryLinear) for module in model.modules()) == binary_maps
        model.save_pretrained(tmp_path / str(binary_maps))
        again = hub.open_any(tmp_path / str(binary_maps))
        assert torch.equal(logits(again, batch), logits(model, batch))


def test_other_heads_open_the_same_body(tmp_path: Path) -> None:
    model, batch = binary("bert"), tiny_batch("bert")
    model.save_pretrained(tmp_path / "head")
    with torch.no_grad():
        wanted = model.bert(**batch).last_hidden_state
        for cls in (AutoModel, AutoModelForTokenClassification):
            body = cls.from_pretrained(tmp_path / "head").base_model
            assert torch.equal(body(**batch).last_hidden_state, wanted)
        AutoModel.from_pretrained(tmp_path / "head").save_pretrained(tmp_path / "body")
        body = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body").base_model
        assert torch.equal(body(**batch).last_hidden_state, wanted)


def test_a_head_keeps_its_activation(tmp_path: Path) -> None:
    batch = tiny_batch("bert")
    model: Any = BertForMaskedLM(tiny_model("bert").config).eval()  # type: ignore[arg-type]
    secateur.binarize(model, [batch], embeddings="float")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(BertForMaskedLM.from_pretrained(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("how", ["1bit", "int8"])
def test_a_folder_is_the_model_after_training_of_ones_own(how: Any, tmp_path: Path) -> None:
    model, batch = binary("bert", embeddings=how), tiny_batch("bert")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    model(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(hub.open_any(tmp_path), batch), logits(model, batch))
    model.bert.encoder.layer[1].output.dense.weight.data.neg_()  # a write that leaves no trace
    assert not torch.equal(logits(hub.open_any(tmp_path), batch), logits(model, batch))


def test_autocast_leaves_products_alone() -> None:
    dense = binary("bert").bert.encoder.layer[0].output.dense
    x = torch.randn(5, dense.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = dense(x)
    with torch.no_grad():
        assert torch.equal(found, dense(x))


@pytest.mark.parametrize("two_sets", [True, False])
def test_padding_changes_nothing(two_sets: bool) -> None:
    model = binary("bert", two_sets=two_sets)
    ids = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    long = {name: torch.nn.functional.pad(tensor, (0, 6)) for name, tensor in short.items()}
    torch.testing.assert_close(logits(model, long), logits(model, short), rtol=1e-5, atol=1e-5)
    long["attention_mask"][1] = 0  # a row of nothing but padding
    assert torch.equal(logits(secateur.packed_twin(model), long), logits(model, long))


def test_calibration_sees_every_channel_and_keeps_little() -> None:
    quantizer = Quantizer(Levels(1, True), 768, torch.zeros(1))
    x = torch.ones(8, 128, 768)
    x[..., 0] = 100.0  # 2 mean |x| = 2 (767 + 100)/768
    quantizer._calibration = _Calibration("mean", [])
    quantizer(x)
    assert float(quantizer.alpha.detach()) == pytest.approx(2 * 867 / 768, rel=0.1)
    assert quantizer._calibration.seen[0].untyped_storage().nbytes() == 4 * SAMPLE


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(BINARY)))
def test_other_families_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be binarized"):
        secateur.binarize(tiny_model(family), [tiny_batch(family)])  # type: ignore[arg-type]


def test_a_row_does_not_depend_on_its_batch() -> None:
    for bits in (1, 2, 4):
        model, batch = binary("bert", bits), tiny_batch("bert", batch=5)
        together = logits(model, batch)
        alone = torch.cat([logits(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(5)])
        assert torch.equal(together.argmax(-1), alone.argmax(-1))
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_file_holds_a_bit_for_each_weight(tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "vocab_size": 1000}
    model: Any = tiny_model("bert", **wide)
    secateur.binarize(model, [tiny_batch("bert")], embeddings="int8")
    model.save_pretrained(tmp_path)
    weights = {
        name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, BinaryLinear)
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = sum(tensors[f"{name}.weight"].nbytes + tensors[f"{name}.weight_scale"].nbytes for name in weights)
    assert sum(weights.values()) / 8 <= stored <= sum(weights.values()) / 8 * 1.01
    table = "bert.embeddings.word_embeddings.weight"
    assert tensors[table].nbytes == 1000 * 128
    named = {*(f"{name}.weight" for name in weights), *(f"{name}.weight_scale" for name in weights), table}
    rest = sum(t.nbytes for n, t in tensors.items() if n not in named)
    header = (tmp_path / "model.safetensors").stat().st_size - sum(t.nbytes for t in tensors.values())
    floats = sum(p.nbytes for n, p in model.named_parameters() if n not in named)
    assert rest == floats + 4 * 1000  # what stays float, and the scales of the table's rows
    assert header < 200 * len(tensors)


def test_training_goes_on_from_bits(tmp_path: Path) -> None:
    model, batch = binary("bert"), tiny_batch("bert")
    model.save_pretrained(tmp_path)
    again: Any = hub.open_any(tmp_path)
    before = logits(again, batch)
    again.train()
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    for _ in range(3):
        again(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
        assert all(p.grad is not None for p in again.parameters())
        optimizer.step()
        optimizer.zero_grad()
    again.eval()
    assert not torch.equal(logits(again, batch), before)
    again.save_pretrained(tmp_path / "on")
    assert torch.equal(logits(hub.open_any(tmp_path / "on"), batch), logits(again, batch))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))  # as a resumed trainer does
    assert torch.equal(logits(again, batch), before)


def test_other_bits_keep_weights_and_shifts() -> None:
    model, batch = binary("bert", 2), tiny_batch("bert")
    latent = model.bert.encoder.layer[0].output.dense.weight.clone()
    shift = model.bert.encoder.layer[0].output.dense.input_bits.shift.clone()
    alpha = model.bert.encoder.layer[0].output.dense.input_bits.alpha.clone()
    secateur.binarize(model, [batch], 1)
    dense = model.bert.encoder.layer[0].output.dense
    assert torch.equal(dense.weight, latent)
    assert torch.equal(dense.input_bits.shift, shift)
    assert not torch.equal(dense.input_bits.alpha, alpha)  # calibrated anew for one bit
    assert len(hub.edits_of(model)) == 1
    assert torch.equal(logits(secateur.packed_twin(model), batch), logits(model, batch))


@pytest.mark.parametrize("how", ["random", "layer without both"])
def test_sliced_and_sparse_models_become_binary(how: str, tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    model.bert.encoder.layer[0].intermediate.dense.weight.data[:9] = 0
    secateur.sparsify(model)
    kept = cut(model, how)
    secateur.apply_edits(model, [secateur.Slice(kept)])
    hub.attach(model, [secateur.Slice(kept)])
    batch = tiny_batch("bert")
    secateur.binarize(model, [batch])
    assert [edit.type for edit in hub.edits_of(model)] == ["slice", "binarize"]
    model.save_pretrained(tmp_path)
    again = hub.open_any(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert torch.equal(logits(secateur.packed_twin(model), batch), logits(model, batch))
    with pytest.raises(SecateurError, match="binarize it last"):
        secateur.apply_edits(again, [secateur.Slice(secateur.SubNetwork.full(again))])


def test_a_copy_is_independent() -> None:
    model, batch = binary("mpnet"), tiny_batch("mpnet")
    wanted = logits(model, batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert torch.equal(logits(model, batch), wanted)


def test_without_the_package_the_folder_is_refused(tmp_path: Path) -> None:
    binary().save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "size" in run.stderr.lower()


@pytest.mark.parametrize("damage", ["flip", "drop", "short", "alpha", "shift", "scale", "larger alpha"])
def test_damaged_bits_are_refused(damage: str, tmp_path: Path) -> None:
    binary().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = "bert.encoder.layer.1.output.dense.weight"
    if damage == "flip":
        tensors[name][3, 0] ^= 4
    elif damage == "drop":
        del tensors[name]
    elif damage in ("alpha", "shift"):
        del tensors[name.replace("weight", f"input_bits.{damage}")]
    elif damage == "scale":
        del tensors[f"{name}_scale"]
    elif damage == "larger alpha":
        tensors[name.replace("weight", "input_bits.alpha")] *= 1000
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata)
    with pytest.raises(InvalidModel):
        hub.open_model(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "drop"])
def test_damaged_bits_of_other_names_are_refused(damage: str, tmp_path: Path) -> None:
    """ViT is stored under other names than its modules have."""
    binary("vit").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("attention.attention.query.weight"))
    if damage == "flip":
        tensors[name][3, 0] ^= 4
    else:
        del tensors[name]
    save_file(tensors, file, metadata)
    with pytest.raises(InvalidModel, match="q_proj.weight' is not what the model was saved with"):
        auto_class("vit").from_pretrained(tmp_path)


def test_bits_are_checked_whatever_the_precision(tmp_path: Path) -> None:
    """Stored in one precision and read in another; a changed scale is noticed in all."""
    for stored in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(stored)
        binary().to(stored).save_pretrained(folder)
        file, name = folder / "model.safetensors", "bert.encoder.layer.1.output.dense.input_bits.alpha"
        for read in (torch.float32, torch.bfloat16):
            assert AutoModelForSequenceClassification.from_pretrained(folder, dtype=read).dtype == read
        hub.open_model(folder)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        tensors[name] *= 100
        save_file(tensors, file, metadata)
        for read in (torch.float32, torch.bfloat16):
            with pytest.raises(InvalidModel, match="the file is damaged"):
                AutoModelForSequenceClassification.from_pretrained(folder, dtype=read)


def test_what_one_bit_attention_cannot_do_is_refused(tmp_path: Path) -> None:
    decoder = BertLMHeadModel(BertConfig(**BERT, is_decoder=True))
    with pytest.raises(UnsupportedModel, match="used as a decoder"):
        secateur.binarize(decoder, [tiny_batch("bert")])
    model = binary()
    (edit,) = hub.edits_of(model)
    with pytest.raises(SecateurError, match="relu=True"):
        apply_edits(model, [replace(edit, relu=False)])
    binary().save_pretrained(tmp_path)
    flexible = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="flex_attention")
    with pytest.raises(SecateurError, match="attn_implementation='sdpa'"):
        flexible(**tiny_batch("bert"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": {"encoder.layer.0.output.dense": 3}}, "1, 2, 4 or 8 bits"),
        ({"embeddings": "2bit"}, "embeddings is float or int8 or 1bit"),
        ({"colour": "red"}, "unknown or missing keys: colour"),
    ],
)
def test_tampered_edits_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    binary().save_pretrained(tmp_path)
    (edit,) = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["edits"]
    edit_config(tmp_path, edits=[edit | change])
    with pytest.raises(InvalidModel, match=message):
        hub.open_model(tmp_path)


def test_bad_input() -> None:
    model: Any = tiny_model("bert")
    batch = tiny_batch("bert")
    for bits in (0, 3, 16, 32):
        with pytest.raises(SecateurError, match="1, 2, 4 or 8 bits"):
            secateur.binarize(model, [batch], bits)
    with pytest.raises(SecateurError, match="'decoder' fits no site"):
        secateur.binarize(model, [batch], mixed={"decoder": 2})
    with pytest.raises(SecateurError, match="no regular expression"):
        secateur.binarize(model, [batch], mixed={"(": 2})
    with pytest.raises(SecateurError, match="nothing to calibrate on"):
        secateur.binarize(model, [])
    tied: Any = BertForMaskedLM(model.config).eval()
    with pytest.raises(UnsupportedModel, match="shares the table of words"):
        secateur.binarize(tied, [batch])
    with pytest.raises(SecateurError, match="is not binary"):
        secateur.packed_twin(model)
    dense: Any = tiny_model("bert")
    assert torch.equal(logits(model, batch), logits(dense, batch))  # what was refused changed nothing
    assert not any(isinstance(module, BinaryLinear) for one in (model, tied) for module in one.modules())
    with pytest.raises(UnsupportedModel, match="reads no words"):
        secateur.binarize(tiny_model("vit"), [tiny_batch("vit")])  # type: ignore[arg-type]
    assert "encoder.layer.0.attention.self:probs" in places(tiny_model("bert"))


# --- token elimination ------------------------------------------------------------------------------------------------

DROPPING = [name for name in BINARY if name in TOKEN_SPECS]
DROPPING_FORMS = [(f, packed) for f in DROPPING for packed in (False, True) if not (packed and f == "mpnet")]


def eliminating(model: Any, alpha: float = 1.0, **changes: Any) -> Any:
    """The model with a dial that is saved with it."""
    edit = DropTokens(**{"profile": (0.8, 0.55, 0.3), "tokens": 16, "alpha": alpha, **changes})
    secateur.apply_edits(model, [edit])
    hub.attach(model, [edit])
    return model


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("family", DROPPING)
def test_a_binary_model_gets_a_dial(family: str, bits: int, tmp_path: Path) -> None:
    batch = ragged((9, 4, 13, 1))
    model = eliminating(binary(family, bits))
    dense, found = logits(binary(family, bits), batch), logits(model, batch)
    assert float((found - dense).abs().max()) > 0.01  # tokens did go
    with model.secateur.at(0.0):
        assert torch.equal(logits(model, batch), dense)
    torch.testing.assert_close(logits(secateur.packed_twin(model), batch), found, atol=1e-6, rtol=0)
    model.secateur.speedup = 1.7
    found = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = hub.open_model(tmp_path)
    assert [edit.type for edit in hub.edits_of(again)] == ["binarize", "drop_tokens"]
    assert again.secateur.speedup == model.secateur.speedup >= 1.7
    assert torch.equal(logits(again, batch), found)
    again.secateur.speedup = 1
    assert torch.equal(logits(again, batch), dense)
    again.save_pretrained(tmp_path / "again")
    third: Any = hub.open_model(tmp_path / "again")
    assert third.secateur.alpha == 0
    assert all(torch.equal(a, b) for a, b in zip(third.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", DROPPING)
def test_the_order_of_bits_and_dial_does_not_matter(family: str, tmp_path: Path) -> None:
    """What is calibrated is the dense model; other bits may come later, and elimination stays."""
    batch = ragged((9, 4, 13))
    model: Any = eliminating(tiny_model(family))
    secateur.binarize(model, [tiny_batch(family, seed=5)])
    usual: Any = tiny_model(family)
    secateur.binarize(usual, [tiny_batch(family, seed=5)])
    dense = logits(usual, batch)
    assert torch.equal(logits(model, batch), logits(eliminating(usual), batch))
    with model.secateur.at(0.0):
        assert torch.equal(logits(model, batch), dense)
    model.save_pretrained(tmp_path)
    again: Any = hub.open_model(tmp_path)
    assert [edit.type for edit in hub.edits_of(again)] == ["drop_tokens", "binarize"]
    assert torch.equal(logits(again, batch), logits(model, batch))
    for one in (usual, model):
        secateur.binarize(one, [batch], 4)
    assert torch.equal(logits(usual, batch), logits(model, batch))
    assert not torch.allclose(logits(usual, batch), logits(again, batch), atol=1e-3)
    with pytest.raises(SecateurError, match="binarize it last"):
        secateur.apply_edits(model, [secateur.Slice(secateur.SubNetwork.full(model))])


@pytest.mark.parametrize(("family", "packed"), DROPPING_FORMS)
@pytest.mark.parametrize("how", ["plain", "smoothed", "attention, diagonal", "few queries", "two bits"])
def test_a_binary_example_does_not_depend_on_its_batch(family: str, packed: bool, how: str) -> None:
    lengths = (9, 4, 13, 9, 1)
    settings: dict[str, dict[str, Any]] = {
        "smoothed": {"beta": 0.5},
        "attention, diagonal": {"weighting": "attention", "diagonal": True},
        "few queries": {"queries": 2},
    }
    model = eliminating(binary(family, 2 if how == "two bits" else 1), **settings.get(how, {}))
    model.secateur.packed = packed
    found = logits(model, ragged(lengths))
    torch.testing.assert_close(logits(model, ragged(lengths, width=20)), found, atol=1e-6, rtol=0)
    for row, n in enumerate(lengths):
        alone = {name: tensor[row : row + 1, :n] for name, tensor in ragged(lengths).items()}
        torch.testing.assert_close(logits(model, alone), found[row : row + 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("queries", [64, 2])
@pytest.mark.parametrize("family", DROPPING)
def test_the_form_for_export_of_a_binary_model(family: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = eliminating(binary(family), queries=queries, profile=(0.8, 0.8, 0.3))
    batch = ragged((9, 4, 13, 9, 1), width=15)
    expected = logits(model, batch)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("bits", "weighting", "diagonal", "wanted"),
    [
        ({}, "attention", False, [0.8 / 3, 0.8 / 3, 1.6 / 3]),
        ({}, "attention", True, [1.6 / 3, 0.8 / 3, 1.6 / 3]),
        ({}, "value", False, [1 / 4, 1 / 4, 2 / 4]),  # values of one bit have one size
        ({"value": 4}, "value", False, [1 / 9, 2 / 9, 6 / 9]),
        ({"probs": 2}, "value", False, [3 / 11, 4 / 11, 4 / 11]),
    ],
)
def test_scores_by_hand(
    bits: dict[str, int], weighting: Any, diagonal: bool, wanted: list[float], packed: bool
) -> None:
    """Probabilities and values as they are rounded.

    Products of signs +, +, - with +, -, + times ln 2 have the exponentials 2, ½, 2 (twice) and ½, 2, ½: probabilities
    4/9, 1/9, 4/9 and 1/6, 2/3, 1/6. With a scale of 0.8 those from 0.4 on have the bit: 1, 0, 1 and 0, 1, 0; with two
    bits and 0.2 the levels are 2, 1, 2 and 1, 3, 1. Values of four bits round to 1, 2, -3 halves.
    """
    names = ("query", "key", "value", "probs")
    levels = {name: Levels(bits.get(name, 1), name != "probs") for name in names}
    module: Any = torch.nn.Module()
    module.attention_bits = AttentionBits(levels, torch.zeros(())).eval()
    for name, alpha in {
        "query": 2.0,
        "key": math.log(2) / 2,
        "value": 0.5,
        "probs": 0.2 if "probs" in bits else 0.8,
    }.items():
        module.attention_bits.of(name).alpha.data.fill_(alpha)
    query, key, value = (
        torch.tensor(x).view(1, 1, 3, 1) for x in ([0.3, 7.0, -0.1], [0.0, -2.0, 1.0], [0.6, 0.9, -1.4])
    )
    now = Pass(torch.ones(1, 3, dtype=torch.bool), None, Selection(weighting, diagonal), packed)
    now.enter(0)
    token = CURRENT.set(now)
    try:
        with torch.no_grad():
            context, _ = attention(module, query, key, value, scaling=1.0)
    finally:
        CURRENT.reset(token)
    torch.testing.assert_close(now.seen[0], torch.tensor([wanted]), atol=1e-6, rtol=0)
    one, two, three = (1, 2, -3) if "value" in bits else (1, 1, -1)
    read = 0.8 * 0.5 * torch.tensor([one + three, one + three, two])
    if "probs" in bits:
        read = 0.2 * 0.5 * torch.tensor([2 + 1 - 2, 2 + 1 - 2, 1 + 3 - 1])
    torch.testing.assert_close(context.flatten(), read, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", DROPPING)
def test_the_earlier_of_equal_tokens_stay(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without positions the tokens of one word have the same bits, and so the same scores."""
    model: Any = binary(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name or "relative_attention_bias" in name:
                parameter.zero_()
    eliminating(model)
    layouts: list[list[int]] = []
    choose = Pass.choose

    def spy(now: Pass) -> None:
        choose(now)
        layouts.append(now.layout.slots[0].tolist())

    monkeypatch.setattr(Pass, "choose", spy)
    logits(model, {"input_ids": torch.full((1, 11), 7), "attention_mask": torch.ones(1, 11, dtype=torch.long)})
    assert layouts == [list(range(n)) for n in (9, 7, 4)]


def test_gradients_reach_bits_and_scales() -> None:
    model = eliminating(binary("bert")).train()
    model(**ragged((9, 4, 13)), labels=torch.tensor([0, 1, 0])).loss.backward()
    missing = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert missing == []


# --- products of words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 768])
@pytest.mark.parametrize(
    "of_a", [Levels(1, True), Levels(1, False), Levels(2, True), Levels(4, False), Levels(8, True)]
)
@pytest.mark.parametrize("of_b", [Levels(1, True), Levels(1, False), Levels(2, True)])
def test_products_of_words_are_exact(count: int, of_a: Levels, of_b: Levels) -> None:
    generator = torch.Generator().manual_seed(count)
    a, b = (
        to_levels(torch.randn(2, rows, count, generator=generator), torch.tensor(0.02), None, levels)
        for rows, levels in ((5, of_a), (7, of_b))
    )
    wanted = a.to(torch.int64) @ b.to(torch.int64).transpose(-1, -2)
    assert torch.equal(product(Operand.of(a, of_a), Operand.of(b, of_b)), wanted)
    if of_a.is_sign and of_b.is_sign:  # K - 2 pc has the parity of K
        assert bool(((wanted - count) % 2 == 0).all())
        assert int(wanted.abs().max()) <= count


def test_products_of_nothing() -> None:
    sign = Levels(1, True)
    assert product(Operand.of(torch.ones(0, 5), sign), Operand.of(torch.ones(3, 5), sign)).shape == (0, 3)


def test_thresholds_by_hand() -> None:
    # z = ½ whole + bias >= 0 from whole = -2 bias on; never within the bounds for the last channel
    bias = torch.tensor([0.0, 1.0, -1.25, 100.0, -100.0])
    found = thresholds(lambda whole: whole * 0.5 + bias >= 0, -10, 10, (5,))
    assert found.tolist() == [0, -2, 3, -10, 11]


def test_a_table_of_exponentials_decides_as_softmax_does() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = 2 * torch.randint(-32, 33, (2, 3, 50, 50), generator=generator)
    factor, alpha = torch.tensor(0.07), torch.tensor(0.09)
    keep = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    keep[1, ..., 30:] = False
    exponentials = by_table(whole, 64, factor, keep)
    found = bits_by_table(exponentials, alpha)
    scores = (whole.float() * factor).masked_fill(~keep, torch.finfo(torch.float32).min)
    wanted = to_levels(scores.softmax(-1, dtype=torch.float64), alpha, None, Levels(1, False))
    assert torch.equal(found.double(), wanted)
    assert 0.01 < float(found.mean()) < 0.5
    assert not bool(found[1, ..., 30:].any())  # a padded key is never looked at


def test_what_only_a_bit_is_read_of_never_becomes_a_float() -> None:
    twin = secateur.packed_twin(binary("bert"))
    layer = twin.bert.encoder.layer[0]
    folded = [
        layer.attention.self.query,
        layer.attention.self.key,
        layer.attention.self.value,
        layer.intermediate.dense,
    ]
    assert all(isinstance(module, PackedLinear) and module.hands_on is not None for module in folded)
    assert layer.output.dense.hands_on is None  # its outputs are added to the residual stream
    assert layer.output.dense.takes_levels
    assert layer.attention.output.dense.takes_levels


def test_onnx_takes_the_dial_along(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = eliminating(binary("bert"))
    folder = secateur.export(model, tmp_path / "onnx", format="onnx")  # compared there at several lengths
    session = onnxruntime.InferenceSession(next(Path(folder).glob("*.onnx")))
    batch = ragged((9, 4, 13, 1))
    given = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    (found,) = session.run(None, {one.name: given[one.name].numpy() for one in session.get_inputs()})
    torch.testing.assert_close(torch.from_numpy(found), logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "embeddings"), [("bert", "1bit"), ("bert", "int8"), ("vit", "float")])
def test_onnx_holds_the_simulation(family: str, embeddings: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, batch = binary(family, embeddings=embeddings), tiny_batch(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = secateur.export(model, tmp_path / "onnx", format="onnx")
    session = onnxruntime.InferenceSession(next(Path(folder).glob("*.onnx")))
    batch |= {one.name: torch.zeros_like(batch["input_ids"]) for one in session.get_inputs() if one.name not in batch}
    (found,) = session.run(None, {one.name: batch[one.name].numpy() for one in session.get_inputs()})
    torch.testing.assert_close(torch.from_numpy(found), logits(model, batch), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
