"""Prompt elimination in decoders: exact at zero, original positions, a cache of each layer's own length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import secateur.hub as hub
from secateur.edits import DropTokens, apply_edits
from secateur.errors import SecateurError
from tests.conftest import tiny_model

DECODERS = ["gpt2", "llama"]
PROFILE = (0.8, 0.55, 0.3)
ALL_KEPT = 1e-9


def dialled(family: str, alpha: float) -> nn.Module:
    model = tiny_model(family)
    edits = [DropTokens(profile=PROFILE, tokens=16, alpha=alpha, recent=2)]
    apply_edits(model, edits)
    hub.attach(model, edits)
    return model


def prompt(length: int = 12, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **options
        )
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_dense_and_nothing_dropped_are_the_same(family: str) -> None:
    ids, plain = prompt(), tiny_model(family)
    with torch.no_grad():
        wanted = plain(ids).logits
        assert torch.equal(dialled(family, 0.0)(ids).logits, wanted)
        torch.testing.assert_close(dialled(family, ALL_KEPT)(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(generate(dialled(family, ALL_KEPT), ids), generate(plain, ids))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_layer_caches_what_enters_it(family: str, attention: str) -> None:
    model: Any = dialled(family, 1.0)
    model.set_attn_implementation(attention)
    ids, cache = prompt(12), DynamicCache()
    with torch.no_grad():
        first = model(ids, past_key_values=cache, use_cache=True)
        # 12 enter the first layer, ⌈0.8 · 12⌉ = 10 the second, ⌈0.55 · 12⌉ = 7 the third
        assert [layer.keys.shape[2] for layer in cache.layers] == [12, 10, 7]
        assert cache.get_seq_length() == 12  # new tokens go on counting from the prompt's length
        following = model(first.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[2] for layer in cache.layers] == [13, 11, 8]
    assert following.logits.shape == (2, 1, 99)


@pytest.mark.parametrize("family", DECODERS)
def test_new_tokens_see_what_a_pass_without_cache_sees(family: str) -> None:
    """The eliminated prompt and its continuation, with the cache and by hand: the same attention at each layer."""
    model: Any = dialled(family, 1.0)
    ids = prompt(12, batch=1)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        more = prompt(3, batch=1, seed=5)
        together = model(more, past_key_values=cache, use_cache=True).logits
        again = DynamicCache()
        model(ids, past_key_values=again, use_cache=True)
        single = [model(more[:, i : i + 1], past_key_values=again, use_cache=True).logits for i in range(3)]
    torch.testing.assert_close(torch.cat(single, dim=1), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_left_padded_prompt_generates_as_alone(family: str) -> None:
    model = dialled(family, 1.0)
    long, short = prompt(12, batch=1), prompt(7, batch=1, seed=3)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = generate(model, ids, attention_mask=mask)
    assert torch.equal(found[0, 12:], generate(model, long)[0, 12:])
    assert torch.equal(found[1, 12:], generate(model, short)[0, 7:])


@pytest.mark.parametrize("family", DECODERS)
def test_every_position_has_logits_and_trains(family: str) -> None:
    model: Any = dialled(family, 1.0)
    ids = prompt()
    output = model(ids, labels=ids)
    assert output.logits.shape == (2, 12, 99)
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("family", DECODERS)
def test_first_and_last_tokens_stay(family: str) -> None:
    model: Any = dialled(family, 3.0)
    kept: list[list[int]] = []
    dial = model.secateur
    dial.selection = dial.selection.__class__(
        **{
            **vars(dial.selection),
            "chooser": lambda layer, score, layout: kept.append(layout.slots[0].tolist()) or score,
        }
    )
    with torch.no_grad():
        model(prompt(12, batch=1))
    assert all({0, 10, 11} <= set(slots) for slots in kept)
    assert len(kept[-1]) < 12


def test_round_trip_generates_the_same(tmp_path: Any) -> None:
    model: Any = dialled("llama", 1.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.secateur.alpha == 1.0
    assert torch.equal(generate(again, prompt()), generate(model, prompt()))


def test_a_decoder_keeps_its_last_token() -> None:
    with pytest.raises(SecateurError, match="recent=1 or more"):
        DropTokens(profile=PROFILE).apply(tiny_model("gpt2"))
