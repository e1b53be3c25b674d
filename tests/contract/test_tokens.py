"""Token elimination on every encoder that hands tokens on: the invariants of the method, on tiny random models."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import secateur.hub as hub
from secateur.edits import DropTokens, Slice, apply_edits
from secateur.edits.tokens import Dial
from secateur.errors import InvalidData, SecateurError, UnsupportedModel
from secateur.methods import Late
from secateur.subnetwork import SubNetwork
from secateur.tokens.specs import TOKEN_SPECS
from secateur.tokens.state import Pass
from secateur.tokens.traced import TracedPass
from tests.conftest import tiny_batch, tiny_model
from tests.contract.test_families import cut

ENCODERS = [family for family, spec in TOKEN_SPECS.items() if not spec.causal]
PACKED = [family for family in ENCODERS if not TOKEN_SPECS[family].probabilities]
FORMS = [(family, False) for family in ENCODERS] + [(family, True) for family in PACKED]
ALL_KEPT = 1e-9  # the machinery runs and no token goes


def dialled(family: str, alpha: float, packed: bool | None = None, layers: int = 3) -> tuple[nn.Module, Any]:
    """A tiny model with a dial, and the dial."""
    model = tiny_model(family)
    DropTokens(profile=(0.8, 0.55, 0.3)[:layers], tokens=16, alpha=alpha).apply(model)
    dial: Any = model.secateur
    dial.packed = packed
    return model, dial


def ragged(lengths: tuple[int, ...], width: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Random texts of the given lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.randint(5, 99, (n,), generator=generator)
        mask[row, :n] = 1
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("family", ENCODERS)
def test_dial_at_zero_is_the_dense_model_bit_by_bit(family: str) -> None:
    batch = tiny_batch(family)
    model, _ = dialled(family, 0.0)
    assert torch.equal(logits(model, batch), logits(tiny_model(family), batch))


@pytest.mark.parametrize(("family", "packed"), FORMS)
def test_nothing_dropped_equals_dense(family: str, packed: bool) -> None:
    batch = ragged((9, 4, 13, 9, 1))
    model, _ = dialled(family, ALL_KEPT, packed)
    torch.testing.assert_close(logits(model, batch), logits(tiny_model(family), batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", PACKED)
def test_packed_equals_padded(family: str) -> None:
    batch = ragged((9, 4, 13, 9, 1, 30))
    model, dial = dialled(family, 1.0, True)
    found = logits(model, batch)
    assert not torch.allclose(found, logits(tiny_model(family), batch), atol=1e-4)  # tokens did go
    dial.packed = False
    torch.testing.assert_close(found, logits(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "packed"), FORMS)
@pytest.mark.parametrize("how", ["plain", "smoothed", "headless", "attention", "diagonal", "few queries"])
def test_an_example_does_not_depend_on_its_batch(family: str, packed: bool, how: str) -> None:
    lengths = (9, 4, 13, 9, 1)
    batch = ragged(lengths)
    model = tiny_model(family)
    if how == "headless":
        sub = SubNetwork.full(model)
        heads = (sub.heads[0], (False,) * len(sub.heads[1]), sub.heads[2])
        apply_edits(model, [Slice(replace(sub, heads=heads))])
    settings: dict[str, dict[str, Any]] = {
        "smoothed": {"beta": 0.5},
        "attention": {"weighting": "attention"},
        "diagonal": {"diagonal": True},
        "few queries": {"queries": 2},
    }
    DropTokens(profile=(0.8, 0.55, 0.3), tokens=16, alpha=1.0, **settings.get(how, {})).apply(model)
    model.secateur.packed = packed  # type: ignore[union-attr]
    found = logits(model, batch)
    wide = ragged(lengths, width=20)  # the same texts, more padding
    torch.testing.assert_close(logits(model, wide), found, atol=1e-5, rtol=1e-5)
    order = [3, 0, 4, 2, 1]
    shuffled = {name: tensor[order] for name, tensor in batch.items()}
    torch.testing.assert_close(logits(model, shuffled), found[order], atol=1e-5, rtol=1e-5)
    for row, n in enumerate(lengths):
        alone = {name: tensor[row : row + 1, :n] for name, tensor in batch.items()}
        torch.testing.assert_close(logits(model, alone), found[row : row + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "packed"), FORMS)
def test_kept_tokens_are_nested_ascending_and_hold_the_first(
    family: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (9, 4, 13)
    model, _dial = dialled(family, 1.0, packed)
    layouts = []
    choose = Pass.choose

    def spy(now: Pass) -> None:
        choose(now)
        layouts.append([now.layout.slots[i, :n].tolist() for i, n in enumerate(now.layout.lengths)])

    monkeypatch.setattr(Pass, "choose", spy)
    logits(model, ragged(lengths))
    assert [[len(row) for row in layer] for layer in layouts] == [[8, 4, 11], [5, 3, 8], [3, 2, 4]]
    before = [list(range(n)) for n in lengths]
    for layer in layouts:
        for kept, there in zip(layer, before, strict=True):
            assert kept == sorted(set(kept))
            assert kept[0] == 0
            assert set(kept) <= set(there)
        before = layer


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("how", ["plain", "smoothed", "headless", "two stay", "recent", "few queries"])
def test_the_form_for_export_is_the_same(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any count read out of a tensor: the same results, also of tokens that went."""
    model = tiny_model(family)
    if how == "headless":
        sub = SubNetwork.full(model)
        heads = (sub.heads[0], (False,) * len(sub.heads[1]), sub.heads[2])
        apply_edits(model, [Slice(replace(sub, heads=heads))])
    settings: dict[str, dict[str, Any]] = {
        "smoothed": {"beta": 0.5},
        "two stay": {"protected": 2},
        "recent": {"recent": 2},
        "few queries": {"queries": 2},
    }
    DropTokens(profile=(0.8, 0.8, 0.3), tokens=16, alpha=1.0, **settings.get(how, {})).apply(model)
    batch = ragged((9, 4, 13, 9, 1), width=15)
    real = batch["attention_mask"].bool()
    body: Any = model.base_model

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return logits(model, batch), body(**batch)[0][real]

    expected = run()
    begun: list[Any] = []
    usual = model.secateur.begin  # type: ignore[union-attr]
    monkeypatch.setattr(Dial, "begin", lambda dial, real: begun.append(usual(real)) or begun[-1])
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
    assert [type(one) for one in begun] == [TracedPass, TracedPass]


@pytest.mark.parametrize("family", ENCODERS)
def test_copies_have_their_own_dial(family: str) -> None:
    model, dial = dialled(family, 1.0)
    twin = copy.deepcopy(model)
    batch = ragged((9, 4))
    before = logits(model, batch)
    twin.secateur.alpha = 0.0  # type: ignore[union-attr]
    assert torch.equal(logits(twin, batch), logits(tiny_model(family), batch))
    assert dial.alpha == 1.0
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize(("family", "packed"), FORMS)
def test_gradients_flow(family: str, packed: bool) -> None:
    model, _ = dialled(family, 1.0, packed)
    model(**ragged((9, 4, 13)), labels=torch.tensor([0, 1, 0])).loss.backward()
    missing = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert missing == []


def attached(family: str, alpha: float) -> nn.Module:
    """A tiny model that saves its elimination."""
    model = tiny_model(family)
    edits = [DropTokens(profile=(0.8, 0.55, 0.3), tokens=16, alpha=alpha)]
    apply_edits(model, edits)
    hub.attach(model, edits)
    return model


@pytest.mark.parametrize("family", ENCODERS)
def test_round_trip_keeps_weights_dial_and_results(family: str, tmp_path: Path) -> None:
    model, batch = attached(family, 0.0), ragged((9, 4, 13))
    model.secateur.alpha = 1.25  # type: ignore[union-attr]  # where the dial stands is saved
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.secateur.alpha == 1.25
    assert torch.equal(logits(again, batch), logits(model, batch))
    again.secateur.alpha = 0.0
    assert torch.equal(logits(again, batch), logits(tiny_model(family), batch))
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert third.secateur.alpha == 0.0
    assert torch.equal(logits(third, batch), logits(again, batch))
    assert all(torch.equal(a, b) for a, b in zip(third.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", ENCODERS)
def test_slices_and_elimination_compose(family: str, tmp_path: Path) -> None:
    model, batch = attached(family, 1.0), ragged((9, 4, 13))
    edits = [Slice(cut(model, "random"))]
    apply_edits(model, edits)
    hub.attach(model, edits)
    plain = tiny_model(family)
    apply_edits(plain, edits)
    with model.secateur.at(0.0):  # type: ignore[union-attr, operator]
        torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert [edit.type for edit in hub.edits_of(again)] == ["drop_tokens", "slice"]
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_trainer_resumes_from_what_it_saved(tmp_path: Path) -> None:
    model = attached("bert", 1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    weights = load_file(tmp_path / "model.safetensors")
    twin = attached("bert", 1.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(weights)  # what `Trainer` does with its checkpoint
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())


def test_without_the_package_the_folder_is_refused(tmp_path: Path) -> None:
    attached("bert", 1.0).save_pretrained(tmp_path)  # type: ignore[operator]
    for cls in ("AutoModelForSequenceClassification", "AutoModel"):
        code = f"import transformers; transformers.{cls}.from_pretrained({str(tmp_path)!r})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert run.returncode != 0
        assert "size" in run.stderr.lower()
        code = "import secateur; " + code
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr


def test_dropped_tokens_get_gradients_from_their_keys_and_values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _dial = dialled("bert", 1.0, False)
    batch = ragged((10,))
    embedded = model.base_model.embeddings(batch["input_ids"]).detach().requires_grad_()  # type: ignore[union-attr, operator]
    inputs = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"]}
    states: list[Tensor] = []
    shorten = Pass.shorten

    def keep(now: Pass, hidden: Tensor, last: bool = True) -> Tensor:
        hidden.retain_grad()
        states.append(hidden)
        return shorten(now, hidden, last=last)

    monkeypatch.setattr(Pass, "shorten", keep)
    model(**inputs, labels=torch.tensor([1])).loss.backward()
    # after the first layer's attention 8 of 10 tokens stay: the other two get nothing from what comes later
    reached = states[0].grad[0].abs().sum(dim=-1) > 0  # type: ignore[index]
    assert int(reached.sum()) == 8
    assert bool((embedded.grad[0].abs().sum(dim=-1) > 0).all())  # type: ignore[index]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_encoders_run_as_decoders_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel, match="set is_decoder and add_cross_attention to False"):
        DropTokens(profile=(0.8, 0.55, 0.3)).apply(tiny_model(family, is_decoder=True))


def test_deberta_with_a_convolution_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="conv_kernel_size"):
        DropTokens(profile=(0.8, 0.55, 0.3)).apply(tiny_model("deberta-v2", conv_kernel_size=3))


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_states_of_every_layer_are_there_only_while_dense(flag: str) -> None:
    model, dial = dialled("bert", 1.0)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with pytest.raises(InvalidData, match=f"{flag} with tokens eliminated"):
        model(**ragged((9, 4)), **{flag: True})
    dial.speedup = 1
    assert len(model(**ragged((9, 4)), **{flag: True})[1]) >= 3


def test_gradient_checkpointing_is_refused_while_turned() -> None:
    model, dial = dialled("bert", 1.0)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # type: ignore[operator]
    with pytest.raises(SecateurError, match="gradient checkpointing"):
        model(**ragged((9, 4)), labels=torch.tensor([0, 1]))
    dial.speedup = 1
    model(**ragged((9, 4)), labels=torch.tensor([0, 1])).loss.backward()


def test_a_dense_dial_takes_every_mask_that_the_model_takes() -> None:
    model, _ = dialled("bert", 0.0)
    batch = ragged((9, 9))
    square = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    wanted = logits(tiny_model("bert"), {**batch, "attention_mask": square})
    assert torch.equal(logits(model, {**batch, "attention_mask": square}), wanted)


def test_weights_that_something_else_saved_beside_the_edits_open(tmp_path: Path) -> None:
    model = attached("bert", 1.0)
    model.base_model.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again.embeddings.word_embeddings.weight, model.base_model.embeddings.word_embeddings.weight)  # type: ignore[union-attr]
    assert again.secateur.alpha == 1.0


def test_costs_follow_a_later_slice() -> None:
    model, dial = dialled("bert", 1.0)
    before = dial.speedup
    apply_edits(model, [Slice(cut(model, "layer without neurons"))])
    assert dial.speedup != before
    assert dial.speedup == copy.deepcopy(model).secateur.speedup  # type: ignore[union-attr]


def test_settings_within_a_context_are_of_one_thread() -> None:
    model, dial = dialled("bert", 1.0)
    batch = ragged((9, 4))
    turned = logits(model, batch)
    with dial.at(0.0), ThreadPoolExecutor(1) as pool:
        assert dial.alpha == 0.0
        assert torch.equal(logits(model, batch), logits(tiny_model("bert"), batch))
        assert torch.equal(pool.submit(logits, model, batch).result(), turned)
        dial.alpha = 2.0  # set for good, in force after the context
    assert dial.alpha == 2.0


@pytest.mark.parametrize("packed", [False, True])
def test_answers_may_begin_at_tokens_that_went(packed: bool) -> None:
    """Extractive question answering: every token of the input has a start and an end, and nothing is lost at 1."""
    body: Any = tiny_model("bert")
    dense = AutoModelForQuestionAnswering.from_config(body.config).eval()
    dense.bert.load_state_dict(body.bert.state_dict(), strict=False)  # its weights are large enough to matter
    model = copy.deepcopy(dense)
    batch = ragged((9, 13))
    inputs = [{**batch, "attention_mask": batch["attention_mask"]}]
    edit = Late(tolerance=0.2).edit(model, inputs, 12)
    assert edit.profile[0] >= edit.profile[1] >= edit.profile[2] > 1e-3  # the last layer is read at every token
    edit.apply(model)
    model.secateur.packed = packed
    with torch.no_grad():
        assert torch.equal(model(**batch).start_logits, dense(**batch).start_logits)
        model.secateur.speedup = 1.5
        found = model(**batch, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4]))
    assert found.start_logits.shape == found.end_logits.shape == (2, 13)
    assert bool(found.start_logits.isfinite().all())
    assert bool(found.loss.isfinite())


@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_on_a_cpu(packed: bool) -> None:
    """float16 keeps the tokens that float32 keeps, to its own precision."""
    model: Any = tiny_model("bert")
    DropTokens(profile=(0.8, 0.55, 0.3), tokens=16, alpha=1.0).apply(model)
    model.secateur.packed = packed
    batch = ragged((9, 4, 13))
    wanted = logits(model, batch)
    found = logits(nn.Module.half(copy.deepcopy(model)), batch)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.02)
