"""What each strategy trains, with passes counted and losses worked out by hand (spec 4, 13.10 and 13.11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, mse_loss

from secateur.errors import SecateurError
from secateur.families import sites
from secateur.gates import only
from secateur.optimize.spaces import Space
from secateur.train.supernet import Strategy, SuperNetwork, in_place_distillation
from tests.conftest import in_processes, tiny_batch, tiny_model


def super_network(strategy: Strategy, **more: Any) -> tuple[Any, SuperNetwork]:
    model: Any = tiny_model("bert")
    return model, SuperNetwork(Space.of("small", sites(model)), strategy, **more)


def labelled(batch: int = 3) -> dict[str, torch.Tensor]:
    return tiny_batch("bert", batch) | {"labels": torch.arange(batch) % 2}


@pytest.mark.parametrize(
    ("strategy", "count", "passes"),
    [
        ("standard", None, 1),
        ("random", None, 1),
        ("random", 3, 3),
        ("linear", None, 1),
        ("sandwich", None, 4),
        ("distilled", None, 3),
        ("one-shot", None, 4),
        ("one-shot", 5, 7),
    ],
)
def test_passes_of_the_last_step(strategy: Strategy, count: int | None, passes: int) -> None:
    model, network = super_network(strategy, count=count)
    network.passes = network.at(99, 100)
    calls: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    network.objective(model, labelled()).backward()
    assert len(calls) == passes
    assert sum(calls) == (passes - 1 if strategy == "distilled" else passes)  # its teacher learns nothing


def test_the_coin_goes_from_never_to_always() -> None:
    for strategy in ("linear", "distilled"):
        _, network = super_network(strategy)
        assert all(not network.at(0, steps).subs for steps in (2, 100))
        assert all(network.at(steps - 1, steps).subs for steps in (2, 100))
        share = sum(bool(network.at(step, 2000).subs) for step in range(2000)) / 2000
        assert share == pytest.approx(0.5, abs=0.03)
        assert all(network.at(step, 100).full != bool(network.at(step, 100).subs) for step in range(100))


def test_draws_depend_on_seed_and_step_alone() -> None:
    _, one = super_network("sandwich")
    _, again = super_network("sandwich")
    _, other = super_network("sandwich", seed=1)
    draws = [one.at(step, 50) for step in range(50)]
    assert [again.at(step, 50) for step in reversed(range(50))] == draws[::-1]
    assert [other.at(step, 50) for step in range(50)] != draws
    assert len({sub for passes in draws for sub in passes.subs}) > 30


def test_losses_by_hand() -> None:
    batch = labelled()
    for strategy in ("random", "sandwich", "one-shot", "distilled"):
        model, network = super_network(strategy, temperature=4.0)
        model.eval()
        network.passes = network.at(9, 10)
        full = model(**batch).logits
        expected = cross_entropy(full, batch["labels"]) if strategy in ("sandwich", "one-shot") else 0.0
        for sub in network.passes.subs:
            with only(model, sub):
                logits = model(**batch).logits
            expected = expected + cross_entropy(logits, batch["labels"])
            if strategy in ("one-shot", "distilled"):
                wanted = (full / 4).softmax(1)
                entropy = -(wanted * wanted.log()).sum(1).mean()
                expected = expected + 16 * (cross_entropy(logits / 4, wanted) - entropy)
        assert float(network.objective(model, batch)) == pytest.approx(float(expected), rel=1e-5)


def test_a_regression_learns_from_the_full_network_alone() -> None:
    logits, wanted = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [1.0]])
    assert float(in_place_distillation(logits, wanted, torch.tensor(9.0), 10.0)) == mse_loss(logits, wanted) == 2.5


def test_distillation_has_no_gradient_at_the_teacher_and_a_like_one_at_any_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(512, 3, generator=generator)
    nothing = torch.zeros(())
    same = wanted.clone().requires_grad_()
    in_place_distillation(same, wanted, nothing, 10.0).backward()
    assert float(same.grad.abs().max()) < 1e-6  # type: ignore[union-attr]
    sizes = []
    for temperature in (1.0, 2.0, 4.0, 10.0):
        logits = torch.randn(512, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        in_place_distillation(logits, wanted, nothing, temperature).backward()
        sizes.append(float(logits.grad.norm()))  # type: ignore[union-attr]
    assert max(sizes) / min(sizes) < 2


def test_the_teacher_gets_no_gradient_from_what_it_teaches() -> None:
    """In "distilled" no parameter that only the full network uses is touched."""
    model, network = super_network("distilled")
    network.passes = network.at(9, 10)
    shallow = network.space.decode((1, 1, 1))
    network.passes = type(network.passes)(False, (shallow,), True)
    network.objective(model, labelled()).backward()
    assert model.bert.encoder.layer[2].output.dense.weight.grad is None
    up = model.bert.encoder.layer[0].intermediate.dense.weight.grad
    assert float(up[0].abs().max()) > 0
    assert float(up[1:].abs().max()) == 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SecateurError, match="trained standard, random, linear, sandwich, distilled, one-shot, not 'x'"):
        super_network("x")  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="1 random sub-network or more"):
        super_network("random", count=0)
    with pytest.raises(SecateurError, match="temperature is above 0"):
        super_network("random", temperature=0)
    model, network = super_network("sandwich")
    with pytest.raises(SecateurError, match="needs a loss"):
        network.objective(model, tiny_batch("bert"))


PARALLEL = """
import sys
import torch; torch.set_num_threads(1)
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from secateur.train import CompressionTrainer
from tests.conftest import tiny_batch
from tests.unit.test_supernet import super_network

class InOrder(CompressionTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

model, network = super_network(sys.argv[2])
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
batch = tiny_batch("bert", 16) | {"labels": torch.arange(16) % 2}
rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(16)]
arguments = TrainingArguments(
    sys.argv[1] + "/run", max_steps=6, per_device_train_batch_size=int(sys.argv[3]), use_cpu=True, report_to="none",
    save_strategy="no", learning_rate=0.1, optim="sgd", max_grad_norm=1.0,
)
trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[network], objective=network.objective)
trainer.train()
save_file({name: w.detach().clone() for name, w in model.state_dict().items()},
          f"{sys.argv[1]}/{trainer.args.world_size}-{trainer.args.process_index}.safetensors")
"""


@pytest.mark.parametrize("strategy", ["one-shot", "random"])
def test_two_processes_train_one_super_network(strategy: str, tmp_path: Path) -> None:
    """Data parallel over gloo, half of each batch in each process: the weights of one process with whole batches."""
    for processes, batch in ((2, "4"), (1, "8")):
        in_processes(processes, PARALLEL, tmp_path, strategy, batch)
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    start = super_network("standard")[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = {name: (one[name] - start[name]).abs().max().item() for name in one}
    assert max(moved.values()) > 0.01
    assert all(torch.allclose(one[name], first[name], atol=1e-4) for name in one)
