"""Kernels that skip zeros agree with the dense product, and are taken where they were measured to be faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import secateur
from secateur.costs.analytic import macs
from secateur.edits.slice import Slice
from secateur.errors import SecateurError
from secateur.runtime import choice
from secateur.sparsity.kernels import BlockKernel, CsrKernel
from secateur.sparsity.linear import SparseLinear, dense_products
from secateur.sparsity.weights import prunable
from tests.conftest import tiny_batch, tiny_model

BLOCK = (4, 2)


def blocky(out: int, inputs: int, share: float, seed: int = 0) -> Tensor:
    """A matrix in which whole blocks are zero."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(out // BLOCK[0], inputs // BLOCK[1], generator=generator) >= share
    spread = there.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return torch.randn(out, inputs, generator=generator) * spread


def sparse_model(family: str = "bert") -> Any:
    """A tiny model with three quarters of its blocks at zero."""
    model: Any = tiny_model(family)
    for seed, weight in enumerate(prunable(model).values()):
        weight.data.mul_(blocky(*weight.shape, share=0.75, seed=seed).ne(0))
    return secateur.sparsify(model, block=BLOCK)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let measuring find what a test says: milliseconds by kernel."""

    def say(**milliseconds: float) -> None:
        def sample(runners: Mapping[str, Callable[[], object]], *_: Any) -> dict[str, list[float]]:
            for runner in runners.values():
                runner()
            return {name: [({"sparse": 0.5} | milliseconds).get(name, 9.0)] for name in runners}

        monkeypatch.setattr(choice, "sample", sample)

    return say


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_kernels_agree_with_the_dense_product(rows: int, share: float, bias: bool) -> None:
    weight, x = blocky(12, 8, share), torch.randn(rows, 8)
    added = torch.randn(12) if bias else None
    wanted = nn.functional.linear(x, weight, added)
    for kernel in (CsrKernel(weight), BlockKernel(weight, BLOCK)):
        found = kernel(x, added)
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_block_kernel_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]])
    kernel = BlockKernel(weight, (1, 2))
    assert kernel.values.tolist() == [[[1, 2]], [[0, -1]]]
    assert (kernel.source.tolist(), kernel.target.tolist()) == ([0, 1], [0, 1])
    assert kernel(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), torch.tensor([0.5, 0.0])).tolist() == [[21.5, -1000]]


def test_another_kernel_has_to_win_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = iter([(1.0, 0.5), (1.0, 0.96), (1.0, 2.0)])

    def sample(runners: Mapping[str, object], *_: Any) -> dict[str, list[float]]:
        times = next(milliseconds) if "csr" in runners else (1.0, 0.9)
        return {name: [time] for name, time in zip(runners, times, strict=True)}

    monkeypatch.setattr(choice, "sample", sample)
    model: Any = tiny_model("bert")
    name, weight = next(iter(prunable(model).items()))
    weight.data[:, 1:] = 0
    (found,) = secateur.choose_kernels(model, rows=(128, 8, 32))
    assert found.maps == (name,)
    assert found.kernels == {8: "csr", 32: "dense", 128: "dense"}
    assert found.milliseconds[32] == {"dense": 1.0, "csr": 0.96}
    assert found.sparsity == 1 - 1 / weight.shape[1]


def test_a_model_that_is_not_faster_as_a_whole_stays_dense(faster: Callable[..., None]) -> None:
    model = sparse_model()
    faster(dense=1.0, csr=0.5, sparse=0.99)
    found = secateur.choose_kernels(model, rows=(8,))
    assert {one.kernels[8] for one in found} == {"dense"}
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    copied = copy.deepcopy(model)  # nothing is left that torch cannot copy
    assert copied.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("rows", [(8, 40, 64), (5,), (200,)])
def test_each_number_of_rows_is_checked_by_itself(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("bert", max_position_embeddings=16)
    for weight in prunable(model).values():
        weight.data[:, 1:] = 0
    seen: list[tuple[int, str | None]] = []
    query = model.bert.encoder.layer[0].attention.self.query

    def sample(runners: Mapping[str, Callable[[], object]], *_: Any) -> dict[str, list[float]]:
        if "csr" in runners:
            return {"dense": [1.0], "csr": [0.5]}
        with query.register_forward_pre_hook(lambda m, x: seen.append((x[0].shape[:-1].numel(), m.kernel_for(x[0])))):
            runners["sparse"]()
        return {"dense": [1.0], "sparse": [0.5 if len(seen) != 2 else 2.0]}

    monkeypatch.setattr(choice, "sample", sample)
    found = secateur.choose_kernels(model, rows)
    wanted = [(count // 16 * 16 if count > 16 else count, "csr") for count in rows]
    assert seen == wanted
    kernels = {count: "dense" if place == 1 else "csr" for place, count in enumerate(rows)}
    assert {tuple(one.kernels.items()) for one in found} == {tuple(kernels.items())}
    assert query.plan == kernels


def test_an_image_with_more_rows_stays_dense(faster: Callable[..., None]) -> None:
    model = sparse_model("vit")
    faster(dense=1.0, csr=0.5)
    found = secateur.choose_kernels(model, rows=(2, 512))
    assert {tuple(one.kernels.values()) for one in found} == {("dense", "csr")}


@pytest.mark.parametrize("kernel", ["csr", "block"])
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "electra", "bart", "t5", "vit"]
)
def test_a_model_computes_the_same(family: str, kernel: str, faster: Callable[..., None]) -> None:
    model, batch = sparse_model(family).eval(), tiny_batch(family)
    with torch.inference_mode():
        before = model(**batch)[0]
        faster(dense=1.0, **{kernel: 0.5})
        found = secateur.choose_kernels(model, rows=(128, 512))
        after = model(**batch)[0]
    assert {name for one in found for name in one.kernels.values()} == {kernel}
    assert {name for one in found for name in one.maps} == set(prunable(model))
    taken = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(taken) == len(prunable(model))
    assert all(set(module.built[1]) == {kernel} for module in taken), "every map ran"
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_only_maps_that_gain_are_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model()

    def sample(runners: Mapping[str, Callable[[], Tensor]], *_: Any) -> dict[str, list[float]]:
        if "sparse" in runners:
            return {"dense": [1.0], "sparse": [0.5]}
        wide = runners["dense"]().shape[1] > 32  # only maps into the neurons gain
        return {name: [0.5 if wide and name == "csr" else 1.0] for name in runners}

    monkeypatch.setattr(choice, "sample", sample)
    found = secateur.choose_kernels(model, rows=(32,))
    gained = {name for one in found if one.kernels[32] == "csr" for name in one.maps}
    changed = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert changed == {f"bert.{name.removesuffix('.weight')}" for name in gained}
    assert {name.rpartition(".layer.")[2][2:] for name in changed} == {"intermediate.dense"}


def test_what_is_not_faster_stays_dense(faster: Callable[..., None]) -> None:
    model = sparse_model()
    faster(dense=1.0, csr=0.5)
    secateur.choose_kernels(model)
    faster(dense=1.0, csr=1.0, block=1.0)
    secateur.choose_kernels(model)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear


def test_rows_beyond_those_measured_are_multiplied_densely(faster: Callable[..., None]) -> None:
    model = sparse_model()
    faster(dense=1.0, csr=0.5)
    secateur.choose_kernels(model, rows=(4, 16))
    query = model.bert.encoder.layer[0].attention.self.query
    with torch.inference_mode():
        named = [query.kernel_for(torch.zeros(1, rows, query.in_features)) for rows in (0, 1, 4, 16, 17)]
    assert named == [None, "csr", "csr", "csr", None]


def test_another_number_of_threads_multiplies_densely(faster: Callable[..., None]) -> None:
    faster(csr=1.0)
    model = sparse_model()
    secateur.choose_kernels(model, rows=(64,))
    owner = next(module for module in model.modules() if isinstance(module, SparseLinear))
    x = torch.ones(3, owner.in_features)
    with torch.inference_mode():
        assert owner.kernel_for(x) == "csr"
        torch.set_num_threads(2)
        try:
            assert owner.kernel_for(x) is None
        finally:
            torch.set_num_threads(1)


def test_blocks_that_need_too_much_memory_are_not_tried(
    faster: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = BlockKernel(torch.ones(8, 6), BLOCK)
    assert kernel.workspace(5) == 6 * (4 + 2) * 5 * 4  # six blocks, float32
    faster(block=1.0)
    monkeypatch.setattr(choice, "WORKSPACE", 1)
    (one, *_) = secateur.choose_kernels(sparse_model(), rows=(64,))
    assert set(one.milliseconds[64]) == {"dense", "csr"}
    assert one.kernels == {64: "dense"}


def test_training_and_traces_stay_dense_and_later_weights_count(faster: Callable[..., None], tmp_path: Path) -> None:
    model, batch = sparse_model(), tiny_batch("bert")
    faster(dense=1.0, csr=0.5)
    secateur.choose_kernels(model)
    query = model.bert.encoder.layer[0].attention.self.query
    model(**batch)[0].sum().backward()
    assert query.weight.grad is not None
    assert query.kernel_for(torch.zeros(1, query.in_features)) is None
    with torch.no_grad():
        model.eval()(**batch)
        for weight in prunable(model).values():
            weight.mul_(2)
        found = model(**batch)[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        torch.testing.assert_close(found, again(**batch)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, copied(**batch)[0], rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert query.kernel_for(torch.zeros(1, query.in_features)) is None
        assert torch.isfinite(copied.bfloat16()(**batch)[0]).all()
    exported = torch.export.export(model, (), batch)
    with torch.inference_mode():
        torch.testing.assert_close(exported.module()(**batch)[0], found, rtol=1e-4, atol=1e-5)


def test_a_fused_optimiser_leaves_no_stale_kernel(faster: Callable[..., None]) -> None:
    model, batch = sparse_model(), tiny_batch("bert")
    faster(dense=1.0, csr=0.5)
    secateur.choose_kernels(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        model(**batch)
    model(**batch)[0].sum().backward()
    optimiser.step()
    with torch.no_grad():
        found = model(**batch)[0]
        with dense_products(model):
            torch.testing.assert_close(found, model(**batch)[0], rtol=1e-4, atol=1e-5)
        secateur.sparsify(model, values="int8")
        found = model(**batch)[0]
        with dense_products(model):
            torch.testing.assert_close(found, model(**batch)[0], rtol=1e-4, atol=1e-5)


def test_only_biases_are_trained(faster: Callable[..., None]) -> None:
    model = sparse_model()
    faster(dense=1.0, csr=0.5)
    secateur.choose_kernels(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    model(**tiny_batch("bert"))[0].sum().backward()
    assert model.bert.encoder.layer[0].attention.self.query.bias.grad is not None


def test_a_model_that_is_sliced_later(faster: Callable[..., None]) -> None:
    model, batch = sparse_model(), tiny_batch("bert")
    faster(dense=1.0, block=0.5)
    secateur.choose_kernels(model)
    keep = secateur.SubNetwork.full(model)
    keep = secateur.SubNetwork(keep.heads, ((False, *keep.neurons[0][1:]), *keep.neurons[1:]))
    secateur.apply_edits(model, [Slice(keep)])
    with torch.inference_mode():
        found = model(**batch)[0]
        with dense_products(model):
            torch.testing.assert_close(found, model(**batch)[0], rtol=1e-4, atol=1e-5)


def test_what_is_counted_and_measured_with_kernels(faster: Callable[..., None]) -> None:
    model = sparse_model()
    full = secateur.SubNetwork.full(model)
    before = macs(model, 2, 16).of(full)
    faster(dense=1.0, csr=0.5)
    found = secateur.measure(model, tokens=16, seconds=0.01, kernels=True)
    assert not any(isinstance(module, SparseLinear) for module in model.modules()), "the model is left as it was"
    assert found["kernels"]["ratio"] == found["kernels"]["latency_ms"]["median"] / found["latency_ms"]["median"]
    assert set(found["kernels"]["choices"][0]["kernels"]) == {8, 16, 32, 128, 512, 2048}
    secateur.choose_kernels(model)
    assert macs(model, 2, 16).of(full) == before
    with pytest.raises(SecateurError, match="prune it first"):
        secateur.measure(tiny_model("bert"), tokens=16, kernels=True)  # type: ignore[arg-type]


def test_weights_that_were_filled_lose_their_kernels(faster: Callable[..., None]) -> None:
    model = sparse_model()
    faster(dense=1.0, csr=0.5)
    secateur.choose_kernels(model)
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.fill_(1)
    with pytest.raises(SecateurError, match="prune it first"):
        secateur.choose_kernels(model)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        (lambda model: model, (0,), "from 1"),
        (lambda model: model, (), "from 1"),
        (lambda model: model.to(torch.bfloat16), (8,), "float32"),
        (lambda model: sparse_model("gpt2"), (8,), "No nn.Linear"),
        (lambda model: tiny_model("bert"), (8,), "prune it first"),
    ],
)
def test_bad_input(change: Callable[[Any], Any], rows: tuple[int, ...], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        secateur.choose_kernels(change(sparse_model()), rows)
