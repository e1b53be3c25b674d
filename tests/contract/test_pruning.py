"""Contract of `Pruning` in a training of one's own: what it counts, holds, refuses and keeps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import secateur
from secateur.edits.sparsify import Sparsify, hold_zeros
from secateur.errors import InvalidBudget, InvalidModel, SecateurError
from secateur.hub import edits_of
from secateur.sparsity.selection import Blocks, choose
from secateur.sparsity.weights import prunable, sparsity
from secateur.train import CompressionTrainer, Pruning, PruningSettings, distilled
from tests.conftest import tiny_model
from tests.contract.test_methods import compress, tiny_task, tiny_tokenizer
from tests.contract.test_mgpp import MGPP, Until, _rows

FAST: dict[str, Any] = dict(interval=1, before=0.2, after=0.2, spike=1e-6)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual: dict[str, Any] = dict(
        max_steps=10, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no",
        learning_rate=1e-3, logging_steps=1,
    )  # fmt: skip
    return TrainingArguments(str(folder), **{**usual, **options})


def trained(
    model: Any, pruning: Pruning, folder: Path, *callbacks: TrainerCallback, kind: str = "bert", **options: Any
) -> Trainer:
    trainer = Trainer(model, arguments(folder, **options), train_dataset=_rows(kind), callbacks=[pruning, *callbacks])  # type: ignore[arg-type]
    trainer.train()
    return trainer


def test_weights_of_the_paper_are_counted() -> None:
    with torch.device("meta"):
        base = AutoModel.from_config(AutoConfig.for_model("bert"))
        large = AutoModel.from_config(AutoConfig.for_model("bart"))
        tiny = tiny_model("bart")
    assert sum(weight.numel() for weight in prunable(base).values()) == 84_934_656
    assert sum(weight.numel() for weight in prunable(large).values()) == 352_321_536
    layers = tiny.config.encoder_layers, tiny.config.decoder_layers  # type: ignore[union-attr]
    assert len(prunable(tiny)) == 6 * layers[0] + 10 * layers[1]


def test_equal_scores_of_transposed_matrices() -> None:
    (mask,) = choose([torch.ones(6, 4).T], 0.5, Blocks())
    assert int((~mask).sum()) == 11  # k - 1 of 24 · 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpt2_with_equal_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2").to(dtype)
    trained(model, Pruning(0.75, PruningSettings(**FAST)), tmp_path, kind="gpt2")
    assert sparsity(prunable(model)) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("score", ["magnitude", "platon"])
def test_bfloat16_autocast(score: Any, tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    trained(model, Pruning(0.75, PruningSettings(score=score, **FAST)), tmp_path, bf16=True)
    assert sparsity(prunable(model)) == pytest.approx(0.75, abs=1e-3)
    assert all(weight.dtype == torch.float32 for weight in prunable(model).values())


def test_regression(tmp_path: Path) -> None:
    model: Any = tiny_model("bert", num_labels=1, problem_type="regression")
    rows = [{**row, "labels": 0.5 * i} for i, row in enumerate(_rows("bert"))]
    Trainer(model, arguments(tmp_path), train_dataset=rows, callbacks=[Pruning(0.75, PruningSettings(**FAST))]).train()  # type: ignore[arg-type]
    assert sparsity(prunable(model)) == pytest.approx(0.75, abs=1e-3)


class Watch(TrainerCallback):
    """The sparsity and the zeros after each step."""

    def __init__(self) -> None:
        self.sparsity: list[float] = []
        self.zeros: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        weights = prunable(model)
        self.sparsity.append(sparsity(weights))
        self.zeros.append({name: weight == 0 for name, weight in weights.items()})


@pytest.mark.parametrize("score", ["magnitude", "platon", "movement"])
def test_the_mask_holds_in_the_tail(score: Any, tmp_path: Path) -> None:
    watch = Watch()
    trained(
        tiny_model("bert"),
        Pruning(0.75, PruningSettings(score=score, prior=False, **{**FAST, "after": 0.4})),
        tmp_path,
        watch,
    )
    assert watch.sparsity[5:] == pytest.approx([0.75] * 5, abs=1e-3)  # chosen in step 5 of 0 to 9 for the last time
    first = watch.zeros[5]
    assert all(torch.equal(zeros[name], first[name]) for zeros in watch.zeros[6:] for name in first)


def _scores(score: Any, grads: list[Tensor], weights: Tensor, **settings: Any) -> Tensor:
    """What a callback ranks a matrix by after some steps with given gradients."""
    model: Any = tiny_model("bert")
    pruning = Pruning(0.5, PruningSettings(score=score, prior=False, before=0.0, after=0.0, **settings))
    state, control, options = TrainerState(max_steps=100), TrainerControl(), arguments(Path("unused"))
    pruning.on_train_begin(options, state, control, model=model)
    for parameter in pruning.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    name, weight = next(iter(pruning.parameters.items()))
    with torch.no_grad():
        weight[0, :3] = weights
    for step, grad in enumerate(grads, 1):
        assert weight.grad is not None
        weight.grad[0, :3] = grad
        state.global_step = step
        pruning.on_pre_optimizer_step(options, state, control)
    return pruning._score(name)[0, :3]


def test_scores_of_platon_by_hand() -> None:
    """Windows of two steps: means of |w g| are 2 and 4, averaged with 0.5, and their spread with 0.75."""
    grads = [torch.tensor([1.0, -1.0, 0.0]), torch.tensor([3.0, 3.0, 0.0]), *[torch.tensor([4.0, 2.0, 0.0])] * 2]
    found = _scores("platon", grads, torch.tensor([1.0, 2.0, 5.0]), interval=2, memory=0.5, doubt=0.75)
    # first weight: I = 2, mean 1, spread 1 · 0.25; then I = 4, mean 2.5, spread 0.25 · 0.75 + 1.5 · 0.25
    assert found.tolist() == pytest.approx([2.5 * 0.5625, (4 * 0.5 + 2 * 0.5) * (0.5 * 0.75 + 1.0 * 0.25), 0.0])


def test_scores_of_movement_by_hand() -> None:
    """Minus the sum of w g: what moves away from zero gains."""
    grads = [torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, -3.0, 0.5])]
    assert _scores("movement", grads, torch.tensor([1.0, 2.0, -4.0])).tolist() == pytest.approx([-3.0, 8.0, 4.0])


def test_the_pull_is_added_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers whatever the parts, also of a weight or a gradient with gaps: gradient + pull / N."""
    monkeypatch.setattr("secateur.train.pruning.PART", 100)
    model: Any = tiny_model("bert")
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.weight = torch.nn.Parameter(dense.weight.detach().T.contiguous().T)
    pruning = Pruning(0.5, PruningSettings(before=0.0, after=0.0), examples=50)
    state, control, options = TrainerState(max_steps=100), TrainerControl(), arguments(Path("unused"))
    pruning.on_train_begin(options, state, control, model=model)
    for parameter in pruning.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    model.bert.encoder.layer[1].intermediate.dense.weight.grad = torch.ones(32, 48).T
    pruning.on_pre_optimizer_step(options, state, control)
    for name, parameter in pruning.parameters.items():
        wanted = 1 + pruning.prior_at(0, name).pull(parameter.detach()) / 50
        assert torch.allclose(parameter.grad, wanted, rtol=1e-6)  # type: ignore[arg-type]


def test_a_step_without_scores_is_waited_for() -> None:
    model: Any = tiny_model("bert")
    pruning = Pruning(0.5, PruningSettings(score="platon", prior=False, interval=1, before=0.0, after=0.0))
    state, control, options = TrainerState(max_steps=20), TrainerControl(), arguments(Path("unused"))
    pruning.on_train_begin(options, state, control, model=model)
    pruning.scaled = True  # as in fp16, where the first steps overflow
    for parameter in pruning.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.inf)
    for step in (0, 1):
        state.global_step = step
        pruning.on_pre_optimizer_step(options, state, control)
        pruning.on_optimizer_step(options, state, control)
    assert pruning.history == []
    state.global_step = 19
    with pytest.raises(SecateurError, match="No step had finite gradients"):
        pruning.on_optimizer_step(options, state, control)


@pytest.mark.parametrize("kind", ["bert", "qa", "gpt2", "bart", "t5"])
def test_a_model_is_no_distance_from_itself(kind: str) -> None:
    model: Any = (
        AutoModelForQuestionAnswering.from_config(tiny_model("bert").config) if kind == "qa" else tiny_model(kind)
    )
    model.eval()
    rows = _rows(kind)[:2]
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    assert float(distilled(model, 1.0)(model, batch)) == pytest.approx(0.0, abs=1e-6)
    other: Any = type(model)(model.config).eval()
    assert float(distilled(other, 1.0)(model, batch)) > 1e-4


def test_outputs_without_logits_cannot_be_distilled() -> None:
    model: Any = AutoModel.from_config(tiny_model("bert").config)
    with pytest.raises(SecateurError, match="no logits to compare"):
        distilled(model, 1.0)(model, {"input_ids": torch.ones(2, 5, dtype=torch.long)})


class Spoil(TrainerCallback):
    """Makes the gradients of a step not a number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)


@pytest.mark.parametrize("own", [True, False], ids=["CompressionTrainer", "Trainer"])
@pytest.mark.parametrize("step", [6, 9])
def test_the_last_good_checkpoint_stays(own: bool, step: int, tmp_path: Path) -> None:
    pruning = Pruning(0.75, PruningSettings(**FAST))
    options = arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    shared: dict[str, Any] = dict(args=options, train_dataset=_rows("bert"))
    trainer: Trainer = (
        CompressionTrainer(tiny_model("bert"), pruning=pruning, callbacks=[Spoil(step)], **shared)
        if own
        else Trainer(tiny_model("bert"), callbacks=[pruning, Spoil(step)], **shared)  # type: ignore[arg-type]
    )
    with pytest.raises(InvalidModel, match=f"diverged at step {step + 1} .* is not finite"):
        trainer.train()
    (kept,) = tmp_path.glob("checkpoint-*")
    assert kept.name == f"checkpoint-{step}"
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(kept / "model.safetensors").values())


@pytest.mark.parametrize("pruned", [True, False])
def test_a_model_that_ends_as_no_number_is_refused(pruned: bool, tmp_path: Path) -> None:
    pruning = Pruning(0.75, PruningSettings(**FAST)) if pruned else None
    trainer = CompressionTrainer(
        tiny_model("bert"), arguments(tmp_path), train_dataset=_rows("bert"), callbacks=[Spoil(9)], pruning=pruning
    )  # type: ignore[arg-type]
    with pytest.raises(InvalidModel, match="diverged at step 10"):
        trainer.train()


def test_frozen_weights(tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(SecateurError, match="layer.0.attention.self.query.weight is frozen"):
        trained(model, Pruning(0.5, PruningSettings(**FAST)), tmp_path)
    trained(model, Pruning(0.5, PruningSettings(weights=r"layer\.1", **FAST)), tmp_path)
    assert len(hold_zeros(model)) == len(prunable(model)) - 6  # of layers that learn


def test_a_callback_that_is_used_again_counts_again(tmp_path: Path) -> None:
    pruning, rows = Pruning(0.5, PruningSettings(**FAST)), _rows("bert")
    for count in (16, 4):
        Trainer(tiny_model("bert"), arguments(tmp_path), train_dataset=rows[:count], callbacks=[pruning]).train()  # type: ignore[arg-type]
        assert pruning.count == count


def test_the_rate_is_that_of_the_optimiser(tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    pruning = Pruning(0.5, PruningSettings(interval=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = Trainer(
        model, arguments(tmp_path, warmup_steps=3), train_dataset=_rows("bert"), callbacks=[pruning],
        optimizers=(optimizer, None),
    )  # type: ignore[arg-type] # fmt: skip
    trainer.train()
    assert pruning.lr == 2e-3
    first = pruning.prior_at(0, next(iter(pruning.parameters)))
    assert first.threshold == pytest.approx(1.5 * 2e-3)


def test_a_run_that_stops_early_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"stopped after 5 of 10 steps, and weights are chosen up to step 7"):
        trained(tiny_model("bert"), Pruning(0.75, PruningSettings(**FAST)), tmp_path, Until(5))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stopped after")
        trained(tiny_model("bert"), Pruning(0.75, PruningSettings(**FAST)), tmp_path, Until(9))


def test_a_resumed_run_knows_its_history(tmp_path: Path) -> None:
    whole = Pruning(0.75, PruningSettings(**FAST))
    trained(tiny_model("bert"), whole, tmp_path / "whole")
    options: dict[str, Any] = dict(save_strategy="steps", save_steps=9)
    trained(tiny_model("bert"), Pruning(0.75, PruningSettings(**FAST)), tmp_path / "run", Until(9), **options)
    pruning = Pruning(0.75, PruningSettings(**FAST))
    trainer = Trainer(
        tiny_model("bert"), arguments(tmp_path / "run", **options), train_dataset=_rows("bert"), callbacks=[pruning]
    )  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=True)
    assert pruning.history == whole.history
    assert [row["step"] for row in pruning.history] == [2, 3, 4, 5, 6, 7]
    assert all(row["sparsity_least"] <= row["sparsity"] <= row["sparsity_most"] for row in pruning.history)
    assert trainer.state.log_history[-1]["sparsity_most"] == whole.last["sparsity_most"]


def test_groups_count_as_inside_the_spike_by_their_norm(tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    pruning = Pruning(0.5, PruningSettings(pattern="4x1", **FAST))
    trained(model, pruning, tmp_path, learning_rate=0.0)  # weights move only to zero
    end = {name: weight.detach() for name, weight in prunable(model).items()}
    limit = pruning.prior_at(7, next(iter(end))).threshold
    norms = torch.cat([w.unflatten(0, (-1, 4)).square().sum(1).sqrt().flatten() for w in end.values()])
    assert pruning.history[-1]["in_spike"] == pytest.approx(float((norms < limit).float().mean()), abs=1e-6)
    assert "spike_over_lr" not in pruning.history[-1]


def test_zeros_of_other_weights_stay_and_count() -> None:
    task, words = tiny_task(), tiny_tokenizer()
    first = compress(
        tiny_model("bert"), secateur.Mgpp(**MGPP), task=task, tokenizer=words, budget="sparsity>=90%"
    ).model
    zeros = {name: weight == 0 for name, weight in prunable(first).items()}
    method = secateur.Mgpp(**{**MGPP, "weights": "intermediate"})
    second = compress(first, method, task=task, tokenizer=words, budget="sparsity>=85%")
    found = prunable(second.model)
    assert all(bool((weight[zeros[name]] == 0).all()) for name, weight in found.items() if "intermediate" not in name)
    assert second.budget["terms"][0]["met"]
    assert second.budget["terms"][0]["reached"] == pytest.approx(0.85, abs=1e-3)
    assert second.after.bytes < 1.1 * second.before.bytes
    with pytest.raises(InvalidBudget, match="met by the zeros that other weights keep"):
        compress(first, method, task=task, tokenizer=words, budget="sparsity>=10%")


def test_values_follow_the_model_and_files_do_not_grow() -> None:
    model: Any = tiny_model("bert").to(torch.bfloat16)
    for weight in prunable(model).values():
        weight.data.view(-1)[::5] = 0
    (edit,) = edits_of(secateur.sparsify(model))
    assert isinstance(edit, Sparsify)
    assert edit.values == "bf16"
    few: Any = tiny_model("bert")
    next(iter(prunable(few).values())).data[0, 0] = 0
    with pytest.warns(UserWarning, match=r"0.0% of the weights are zero: .* Prune more"):
        secateur.sparsify(few)


def test_a_block_has_outputs_and_inputs_however_it_is_stored() -> None:
    model: Any = tiny_model("gpt2")
    weights = prunable(model)
    for weight in weights.values():  # (in, out)
        weight.data.unflatten(1, (-1, 8))[:, ::2] = 0
    (edit,) = edits_of(secateur.sparsify(model, block=(8, 1)))
    assert isinstance(edit, Sparsify)
    assert edit.block == (1, 8)
    assert sum(edit.kept.values()) * 8 == sum(int(weight.count_nonzero()) for weight in weights.values())


def test_a_model_without_heads_has_none_to_prune() -> None:
    model: Any = tiny_model("bert")
    for weight in prunable(model, kinds=("heads",)).values():
        weight.data.zero_()
    secateur.slice_zeros(model)
    with pytest.raises(SecateurError, match="The model has no heads whose weights could go"):
        prunable(model, kinds=("heads",))


def test_settings_of_the_prior_count_with_the_prior_alone() -> None:
    assert secateur.Mgpp(prior=False, slab=1e-10).slab == 1e-10
    with pytest.raises(SecateurError, match="lower lr"):
        secateur.Mgpp(slab=1e-10)
