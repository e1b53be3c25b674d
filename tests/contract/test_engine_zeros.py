"""Contract of zeros in the native engine: blocks and bytes that are 0 take no memory, and change no logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.runtime import Precision, load
from tests.conftest import tiny_model
from tests.contract.test_engine import NATIVE, alone, examples, wide_model

CPU = Path("/proc/cpuinfo")
EXPANDING = [
    tier for tier in NATIVE if tier in ("avx512", "amx") and CPU.is_file() and "avx512_vbmi2" in CPU.read_text()
]


def maps_of(model: Any) -> list[torch.Tensor]:
    """Weights of the layers' maps."""
    return [parameter for name, parameter in model.named_parameters() if parameter.dim() == 2 and ".layer" in name]


@torch.no_grad()
def without_blocks(model: Any, share: float, seed: int = 0) -> Any:
    """The model with about so many of its blocks of 32 outputs and 64 inputs at 0."""
    source = torch.Generator().manual_seed(seed)
    for weight in maps_of(model):
        kept = torch.rand(-(-weight.shape[0] // 32), -(-weight.shape[1] // 64), generator=source) >= share
        weight *= kept.repeat_interleave(32, 0).repeat_interleave(64, 1)[: weight.shape[0], : weight.shape[1]]
    return model


@torch.no_grad()
def without_weights(model: Any, share: float, seed: int = 0) -> Any:
    """The model with about so many of its weights at 0."""
    source = torch.Generator().manual_seed(seed)
    for weight in maps_of(model):
        weight *= torch.rand(weight.shape, generator=source) >= share
    return model


@pytest.mark.parametrize("tier", NATIVE)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_blocks(share: float, precision: Precision, tier: str) -> None:
    """Uneven widths: 200 neurons are 7 panels of 32 and 4 blocks of 64, of which the last are not full."""
    model = without_blocks(wide_model(), share)
    rows = examples([9, 1, 33, 64])
    whole = copy.deepcopy(model)
    with torch.no_grad():  # what is too small to count is multiplied
        for weight in maps_of(whole):
            weight[weight == 0] = 1e-30
    with load(model, precision, tier=tier, threads=2) as engine, load(whole, precision, tier=tier) as dense:
        assert torch.equal(engine(rows), dense(rows))
        assert dense.info()["storage"]["blocks"] == 1
        there = sum(bool(part.any()) for w in maps_of(model) for row in w.split(32) for part in row.split(64, 1))
        blocks = 3 * (4 * 4 * 2 + 7 * 2 + 4 * 4)
        assert engine.info()["storage"]["blocks"] == there / blocks


@pytest.mark.parametrize("tier", EXPANDING)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_masks(share: float, tier: str) -> None:
    """The same whole products, whether all bytes are kept or those that are not 0."""
    model = without_weights(wide_model(), share)
    rows = examples([9, 1, 33, 64])
    with load(model, "int8", tier="avx2") as plain, load(model, "int8", tier=tier) as engine:
        assert plain.info()["storage"]["masked"] == 0
        assert engine.info()["storage"] == {**plain.info()["storage"], "maps": 12, "masked": 12}
        assert (engine(rows) - plain(rows)).abs().max() <= 0.02 * plain(rows).abs().max()


@pytest.mark.parametrize("tier", EXPANDING)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [9, 32, 33])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_masks_of_panels_without_blocks(share: float, tokens: int, threads: int, tier: str) -> None:
    """What is spread out ahead of a panel that has fewer blocks than the ones beside it, or none."""
    model = without_weights(without_blocks(wide_model(), share), 0.7)
    with torch.no_grad():
        for weight in maps_of(model):
            weight[32:64] = 0
    rows = examples([tokens])
    with load(model, "int8", tier="avx2") as plain, load(model, "int8", tier=tier, threads=threads) as engine:
        assert engine.info()["storage"]["masked"] == 12
        assert (engine(rows) - plain(rows)).abs().max() <= 0.02 * plain(rows).abs().max()


@pytest.mark.parametrize("tier", EXPANDING)
def test_bytes_of_masks(tier: str) -> None:
    """One layer of 64 x 64 maps: of 24,576 weights the 10 of each output are kept, and a bit for every one."""
    model = wide_model(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    with torch.no_grad():
        for weight in maps_of(model):
            weight.copy_(torch.arange(weight.shape[1]).expand_as(weight) < 10)
    outputs, panels = 3 * 64 + 64 + 128 + 64, (6, 2, 4, 2)
    weights = (3 * 64 * 64, 64 * 64, 128 * 64, 64 * 128)

    def held(size: int) -> int:
        return -(-size // 64) * 64

    kept = sum(held(10 * 32 * count) for count in panels) + sum(weights) // 8 + sum(held(8 * count) for count in panels)
    lists = sum(held(4 * count + 4) for count in panels)
    steps = held(4 * 6) + held(4 * 2) + held(4 * 4) + held(4 * 2)  # the second block of the last map's inputs is all 0
    with load(model, "int8", tier=tier) as engine:
        found = engine.info()
    assert found["storage"] == {"maps": 4, "masked": 4, "blocks": 14 / 16}
    assert found["bytes"] == kept - 2 * 32 * 64 // 8 + lists + steps + 12 * outputs


def test_few_zeros_are_kept_as_bytes() -> None:
    """A bit for every weight has to pay: with a fifth of zeros it does not."""
    with load(without_weights(wide_model(intermediate_size=256), 0.2), "int8") as engine:
        assert engine.info()["storage"] == {"maps": 12, "masked": 0, "blocks": 1.0}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["modernbert", "distilbert", "mpnet"])
def test_other_families(family: str, precision: Precision) -> None:
    """Gated neurons, norms before the blocks, a bias by distance."""
    model = without_weights(tiny_model(family), 0.8)
    rows = examples([9, 1, 30])
    wanted = alone(model, rows)
    with load(model, precision) as engine:
        assert (engine(rows) - wanted).abs().max() <= (1e-5 if precision == "fp32" else 0.05) * wanted.abs().max()


def test_a_sparse_folder(tmp_path: Path) -> None:
    """Values in int8 are rounded once: an engine of the model before it was saved is as near, but for ties."""
    model = without_blocks(wide_model(intermediate_size=256), 0.75)
    rows = examples([9, 1, 33])
    with load(model, "int8") as engine:
        wanted, storage = engine(rows), engine.info()["storage"]
    secateur.sparsify(model, "int8", (32, 64))
    model.save_pretrained(tmp_path)
    with load(tmp_path, "int8", tokenizer=object()) as engine:
        assert engine.info()["storage"] == storage
        assert storage["blocks"] < 0.4
        assert (engine(rows) - wanted).abs().max() <= 0.01 * wanted.abs().max()
