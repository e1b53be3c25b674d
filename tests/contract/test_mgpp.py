"""Contract of MGPP and its rivals: sparsity, round trip, resume after a kill, two processes, any Trainer, bad input."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import secateur
from secateur import hub
from secateur.errors import InvalidBudget, InvalidData, InvalidModel, SecateurError
from secateur.sparsity.weights import prunable, sparsity
from secateur.train import Pruning, PruningSettings, distilled
from tests.conftest import ENCODERS, in_processes, tiny_model
from tests.contract.test_methods import compress, tiny_task, tiny_tokenizer

MGPP: dict[str, Any] = dict(epochs=3, lr=1e-3, batch_size=16, interval=2)
RANKED: dict[str, dict[str, Any]] = {
    "prior": {},
    "prior, platon's ranking": {"score": "platon"},
    "magnitude": {"prior": False},
    "platon": {"score": "platon", "prior": False},
    "movement": {"score": "movement", "prior": False},
}
EACH = pytest.mark.parametrize("ranked", RANKED.values(), ids=RANKED)


def sparse_bert(share: float = 0.9, values: Any = "fp32") -> Any:
    """A tiny BERT whose smallest weights are zero, with its edit."""
    model: Any = tiny_model("bert")
    weights = prunable(model)
    for weight in weights.values():
        weight.data[weight.abs() < weight.abs().flatten().kthvalue(int(share * weight.numel())).values] = 0
    return secateur.sparsify(model, values)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_family_meets_its_sparsity_and_round_trips(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(
        model,
        secateur.Mgpp(**MGPP),
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget="sparsity>=70%",
        out=tmp_path / "out",
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights = prunable(result.model)
    everything = sum(weight.numel() for weight in weights.values())
    assert 0.7 <= sparsity(weights) <= 0.7 + 3 / everything
    (term,) = result.budget["terms"]
    assert (term["kind"], term["met"], term["limit"]) == ("sparsity", True, 0.7)
    assert term["reached"] == pytest.approx(sparsity(weights))
    assert result.after.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    # a bit for each weight, four bytes for each that stays; names and places of the masks cost some more
    saved = everything * (4 - 1 / 8 - 4 * (1 - sparsity(weights)))
    assert result.before.bytes - result.after.bytes == pytest.approx(saved, abs=200 * len(weights))
    assert result.after.params == result.before.params
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    found, wanted = again.state_dict(), result.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert "70" in (tmp_path / "out" / "README.md").read_text()


@EACH
@pytest.mark.parametrize(("pattern", "share"), [("1x1", 0.8), ("4x2", 0.6), ("2:4", 0.5)])
def test_scores_and_patterns(ranked: dict[str, Any], pattern: str, share: float) -> None:
    method = secateur.Mgpp(**MGPP, **ranked, pattern=pattern)
    result = compress(
        tiny_model("bert"), method, task=tiny_task(), tokenizer=tiny_tokenizer(), budget=f"sparsity>={share}"
    )
    weights = prunable(result.model)
    assert share <= sparsity(weights) <= share + 0.01
    if pattern == "4x2":
        for weight in weights.values():
            there = weight.detach().ne(0).unflatten(0, (-1, 4)).unflatten(2, (-1, 2)).sum(dim=(1, 3))
            assert set(there.unique().tolist()) <= {0, 8}
        assert result.edits[0]["block"] == [4, 2]
    if pattern == "2:4":
        for weight in weights.values():
            assert int(weight.detach().ne(0).unflatten(1, (-1, 4)).sum(dim=-1).max()) <= 2


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({}, "size<=60%"),
        ({"values": "int8"}, "size<=50%"),
        ({"pattern": "4x2"}, "size<=100KB"),
        ({"pattern": "units"}, "size<=75%"),
        ({"weights": "intermediate"}, "size<=88%"),
        ({}, "sparsity>=20%,size<=60%"),
    ],
)
def test_a_budget_of_bytes_holds_for_the_file(settings: dict[str, Any], budget: str, tmp_path: Path) -> None:
    result = compress(
        tiny_model("bert"),
        secateur.Mgpp(**{**MGPP, **settings}),
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget=budget,
        out=tmp_path / "out",
    )
    *_, term = result.budget["terms"]
    assert all(each["met"] for each in result.budget["terms"])
    assert term["reached"] == result.after.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert term["limit"] - 7000 <= term["reached"] <= term["limit"]  # the bound on names and places; whole heads


@pytest.mark.parametrize(("pattern", "score"), [("units", "magnitude"), ("neurons", "movement"), ("heads", "platon")])
def test_whole_units_are_cut_out(pattern: str, score: str, tmp_path: Path) -> None:
    share = {"units": 0.5, "neurons": 0.35, "heads": 0.2}[pattern]
    method = secateur.Mgpp(**MGPP, score=score, pattern=pattern)  # type: ignore[arg-type]
    result = compress(
        tiny_model("bert"),
        method,
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget=f"sparsity>={share}",
        out=tmp_path / "out",
    )
    (term,) = result.budget["terms"]
    assert term["met"]
    assert share <= term["reached"] <= share + 0.1
    assert [edit["type"] for edit in result.edits] == ["slice"]
    assert result.after.macs < result.before.macs
    gone = 1 - sum(w.numel() for w in prunable(result.model).values()) / sum(
        w.numel() for w in prunable(tiny_model("bert")).values()
    )
    assert term["reached"] == pytest.approx(gone)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    wanted = result.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    with pytest.raises(SecateurError, match="leave it out"):
        secateur.Mgpp(pattern=pattern, values="int8")


@EACH
def test_units_of_a_sparse_model_that_lost_a_layer(ranked: dict[str, Any], tmp_path: Path) -> None:
    model = sparse_bert(0.9, "int8")
    full = secateur.SubNetwork.full(model)
    kept = secateur.SubNetwork((tuple(False for _ in full.heads[0]), *full.heads[1:]), full.neurons)
    secateur.apply_edits(model, [secateur.Slice(kept)])
    hub.attach(model, [secateur.Slice(kept)])
    method = secateur.Mgpp(**MGPP, **ranked, pattern="units")
    result = compress(
        model, method, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="sparsity>=50%", out=tmp_path / "out"
    )
    assert sparsity(prunable(result.model)) > 0.85, "zeros of the sparse model stay"
    assert result.after.bytes < result.before.bytes
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in result.model.state_dict().items())


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
def test_values_are_stored_narrower(values: str, tmp_path: Path) -> None:
    model = sparse_bert(0.9, values)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    key = "bert.encoder.layer.0.attention.self.query.weight"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    assert stored[key].dtype == dtypes[values]
    dense = model.state_dict()[key]
    assert stored[f"{key}_mask"].numel() == dense.numel() // 8
    assert (f"{key}_scale" in stored) == (values == "int8")
    found = again.state_dict()
    assert found.keys() == model.state_dict().keys()
    torch.testing.assert_close(found[key], dense, atol=float(dense.abs().max()) / 250, rtol=0)
    body = AutoModel.from_pretrained(tmp_path)  # without the head: other names
    torch.testing.assert_close(body.state_dict()[key.removeprefix("bert.")], found[key])


def test_without_the_package_the_folder_is_refused(tmp_path: Path) -> None:
    sparse_bert().save_pretrained(tmp_path)
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr or "size" in done.stderr


def test_a_damaged_edit_is_refused(tmp_path: Path) -> None:
    sparse_bert().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"values": "fp32"', '"values": "fp64"'))
    with pytest.raises(InvalidModel, match="the sparsify edit cannot be read: Values are stored as fp32, bf16, int8"):
        hub.open_model(tmp_path)


def test_zeros_stay_when_asked_and_a_trainer_resumes(tmp_path: Path) -> None:
    """Further training with a fresh optimiser; its checkpoints hold the sparse form and are read back."""
    sparse_bert().save_pretrained(tmp_path / "sparse")
    rows = Dataset.from_dict({"input_ids": [[1, 7 + i, 9, 2] for i in range(16)], "labels": [i % 2 for i in range(16)]})
    for held in (True, False):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
        zeros = {name: weight.detach() == 0 for name, weight in prunable(model).items()}
        if held:
            secateur.hold_zeros(model)
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=4, save_steps=2, use_cpu=True, report_to="none", weight_decay=0.1
        )
        trainer = secateur.CompressionTrainer(model, arguments, train_dataset=rows)
        trainer.train()
        stays = all(bool((prunable(model)[name] == 0)[mask].all()) for name, mask in zeros.items())
        assert stays is held
        ended = {name: value.clone() for name, value in model.state_dict().items()}
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert all(torch.equal(value, ended[name]) for name, value in model.state_dict().items())


def test_slices_tokens_and_zeros_compose(tmp_path: Path) -> None:
    model = sparse_bert()
    setting = secateur.Optin(batches=1, batch_size=8, probes=2, tune="none", rearrange=False, multiple=8)
    cut = compress(model, setting, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="macs<=70%")
    late = secateur.Late(train_speedup=1.5, epochs=1, batch_size=16, examples=8, lr=0.0)
    result = compress(cut.model, late, task=tiny_task(), tokenizer=tiny_tokenizer(), out=tmp_path / "out",
                      budget="speedup>=1.5")  # fmt: skip
    assert [edit["type"] for edit in result.edits] == ["sparsify", "slice", "drop_tokens"]
    assert sparsity(prunable(result.model)) > 0.85
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = {"input_ids": torch.randint(5, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, result.model(**batch).logits)


def _rows(kind: str) -> list[dict[str, Any]]:
    ids = torch.randint(5, 99, (16, 6), generator=torch.Generator().manual_seed(0)).tolist()
    more: dict[str, Any] = {
        "bert": lambda i: {"labels": i % 2},
        "qa": lambda i: {"start_positions": i % 5, "end_positions": i % 5 + 1},
        "deberta-v2": lambda i: {"labels": i % 2},
        "bart": lambda i: {"labels": ids[i][::-1]},
        "t5": lambda i: {"labels": ids[i][::-1]},
        "gpt2": lambda i: {"labels": ids[i]},
    }
    return [{"input_ids": row, **more[kind](i)} for i, row in enumerate(ids)]


@pytest.mark.parametrize("kind", ["bert", "qa", "deberta-v2", "bart", "t5", "gpt2"])
@pytest.mark.parametrize("ranked", [RANKED[name] for name in ("prior", "movement")], ids=["prior", "movement"])
def test_any_trainer_takes_it(kind: str, ranked: dict[str, Any], tmp_path: Path) -> None:
    """Classification, answers, sequence to sequence and language modelling, with gradient accumulation."""
    torch.manual_seed(0)
    model: Any = (
        AutoModelForQuestionAnswering.from_config(tiny_model("bert").config) if kind == "qa" else tiny_model(kind)  # type: ignore[arg-type]
    )
    settings = PruningSettings(**ranked, interval=1, before=0.2, after=0.2, spike=1e-6)
    pruning = Pruning(0.75, settings)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", save_strategy="no", learning_rate=1e-3, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=_rows(kind), callbacks=[pruning])  # type: ignore[arg-type]
    trainer.train()
    weights = prunable(model)
    total = sum(weight.numel() for weight in weights.values())
    assert 0.75 - 2 / total <= sparsity(weights) <= 0.75
    assert [row["step"] for row in pruning.history] == [2, 3, 4, 5, 6, 7]
    assert pruning.history[0]["sparsity"] == pytest.approx(0.3, abs=2e-4)
    logs = [row for row in trainer.state.log_history if "sparsity" in row]
    assert logs[-1]["sparsity"] == pytest.approx(0.75, abs=2e-4)
    assert set(pruning.sparsities()) == set(weights)
    if settings.prior:
        assert all(row["in_spike"] >= row["sparsity"] for row in pruning.history)
        assert pruning.history[0]["spike_over_lr"] > 0
    if kind == "bart":  # self- and cross-attention and both maps of two stacks
        assert any("encoder_attn" in name for name in weights)


def test_the_prior_touches_no_other_gradient_and_comes_once(tmp_path: Path) -> None:
    """Against the same run without: the gradient grows by pull / N where weights can go, and nowhere else."""

    class Keep(TrainerCallback):
        def __init__(self) -> None:
            self.grads: dict[str, Tensor] = {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 0:
                self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found: dict[bool, dict[str, Tensor]] = {}
    for prior in (False, True):
        model: Any = tiny_model("bert")
        model.eval()
        keep, pruning = Keep(), Pruning(0.5, PruningSettings(prior=prior, before=0.4, anneal="none"))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
            report_to="none", save_strategy="no", max_grad_norm=0.01,
        )  # fmt: skip
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        Trainer(model, arguments, train_dataset=_rows("bert"), callbacks=[pruning, keep]).train()  # type: ignore[arg-type]
        found[prior] = keep.grads
    model = tiny_model("bert")
    weights = {f"bert.{name}": weight for name, weight in prunable(model).items()}
    pull = PruningSettings().mixture(5e-5).pull
    for name, grad in found[True].items():
        added = pull(weights[name].detach()) / 16 if name in weights else 0
        expected = found[False][name] + added
        assert torch.equal(grad, expected) if name not in weights else torch.allclose(grad, expected, rtol=1e-5)


def test_until_it_prunes_magnitude_is_plain_fine_tuning(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [Pruning(0.5, PruningSettings(prior=False, before=0.8, after=0.0))]):
        model: Any = tiny_model("bert")
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=10,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=_rows("bert"), callbacks=[*callbacks, Until(8)])  # type: ignore[arg-type]
        trainer.train()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class Until(TrainerCallback):
    """Stops after so many steps, and takes pruning's last word from it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def _compress(model: Path, out: Path, settings: dict[str, Any], *, resume: bool = False) -> subprocess.Popen[bytes]:
    code = f"""
import torch; torch.set_num_threads(1)
import secateur, secateur.train.loop
secateur.train.loop.CHECKPOINT_SECONDS = 0
from tests.contract.test_mgpp import MGPP
from tests.contract.test_methods import tiny_task
method = secateur.Mgpp(**{{**MGPP, "epochs": 8, **{settings!r}}})
secateur.compress({str(model)!r}, method, task=tiny_task(200), out={str(out)!r}, resume={resume}, seconds=0.05)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


@pytest.mark.parametrize("settings", [{}, {"score": "platon"}, {"score": "movement", "pattern": "units"}])
def test_killed_training_resumes_to_the_same_mask(settings: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL while it prunes; weights and zeros end the same, bit by bit."""
    tiny_model("bert").save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert _compress(tmp_path / "dense", tmp_path / "whole", settings).wait(300) == 0
    run = _compress(tmp_path / "dense", tmp_path / "out", settings)
    checkpoints = tmp_path / "out.run" / "training"
    deadline = time.monotonic() + 300

    def reached() -> int:
        found = [int(path.parent.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*/complete")]
        return max(found, default=0)

    while reached() < 25 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert run.poll() is None  # killed in the middle of the pruning: it begins at step 8 of 80 and ends at 71
    run.send_signal(signal.SIGKILL)
    run.wait()
    last = _compress(tmp_path / "dense", tmp_path / "out", settings, resume=True)
    assert last.wait(300) == 0, last.stderr.read()  # type: ignore[union-attr]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


PARALLEL = """
import sys
import torch; torch.set_num_threads(1)
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from secateur.sparsity.weights import prunable
from secateur.train import Pruning, PruningSettings
from tests.conftest import tiny_model
from tests.contract.test_mgpp import _rows

class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

model, score, prior, batch = tiny_model("bert"), sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
arguments = TrainingArguments(
    sys.argv[1] + "/run", max_steps=8, per_device_train_batch_size=batch, use_cpu=True, report_to="none",
    save_strategy="no", learning_rate=1e-3, max_grad_norm=1.0,
)
pruning = Pruning(0.75, PruningSettings(score=score, prior=prior, interval=1))
trainer = InOrder(model, arguments, train_dataset=_rows("bert"), callbacks=[pruning])
trainer.train()
save_file({name: w.detach().clone() for name, w in prunable(model).items()},
          f"{sys.argv[1]}/{trainer.args.world_size}-{trainer.args.process_index}.safetensors")
"""


@pytest.mark.parametrize(("score", "prior"), [("magnitude", True), ("platon", False)])
def test_two_processes_choose_the_masks_of_one(score: str, prior: bool, tmp_path: Path) -> None:
    """Data parallel over gloo, half of each batch in each process."""
    for processes, batch in ((2, "4"), (1, "8")):
        in_processes(processes, PARALLEL, tmp_path, score, str(prior), batch)
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    differ = sum(int(((one[name] == 0) != (first[name] == 0)).sum()) for name in one)
    # gradients are added up in another order: scores made of gradients move in their last digits, sizes do not pass
    # one another for that
    assert differ == 0 if score == "magnitude" else differ <= 0.01 * sum(weight.numel() for weight in one.values())
    assert sparsity(one) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "budget", "message"),
    [
        ({}, "sparsity>=1", "a sparsity is below 1"),
        ({}, "sparsity>=0", "the limit must be above 0"),
        ({}, "sparsity<=80%", "write 'sparsity>=90%'"),
        ({}, "macs<=50%", "mgpp takes no 'macs' budget: use size, sparsity"),
        ({}, "size<=30KB", "size<=30KB is out of reach: with a sparsity of 0.99 the file .* budget is size<="),
        ({"values": "int8"}, "size<=80%", "met by values='int8' without a zero: ask for less"),
        ({"before": 0.6, "after": 0.5}, None, "together they are below 1"),
        ({"before": 0.5, "after": 0.49}, None, "no room: it would begin at step 4 and end at step 4"),
        ({"pattern": "2:4"}, None, "0.8 is out of reach: of the 21,504 weights that may go, a share of 0.5 can"),
        ({"pattern": "5x5"}, None, "is 32 x 32 and cannot be divided into 5x5"),
        ({"pattern": "many"}, None, "A pattern is '1x1'"),
        ({"weights": "[a-"}, None, "is no regular expression"),
        ({"weights": "no such"}, None, "matches no weight; there are such as encoder.layer.0.attention.self.query"),
        ({"spike": 0.5}, None, "0 < spike <= slab"),
        ({"slab_share": 1.5}, None, "slab's share lies between 0 and 1"),
        ({"floor": 1.5}, None, "floor is a share"),
        ({"slab_last": 0}, None, "slab_last is above 0"),
        ({}, "sparsity>=99.5%", "a share of 0.99 can .* nearest feasible budget is sparsity>=0.99."),
        ({"weights": "self.query"}, None, "nearest feasible budget is sparsity>=0.1"),
        ({"score": "taylor"}, None, "score is magnitude or platon or movement"),
        ({"lr": 1e30}, None, "lower lr"),
        ({"lr": 1e30, "spike": 1e-9}, None, "training diverged"),
    ],
)
def test_bad_settings_and_budgets(settings: dict[str, Any], budget: str | None, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        compress(
            tiny_model("bert"),
            secateur.Mgpp(**{**MGPP, **settings}),
            task=tiny_task(),
            tokenizer=tiny_tokenizer(),
            budget=budget,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_equal_weights_and_ends_as_sparse(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = tiny_model("bert").to(dtype)
    pruning = Pruning(0.9, PruningSettings(before=0.1))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=5e-4, use_cpu=True, report_to="none",
        save_strategy="no",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="chosen only 2 times"):
        Trainer(model, arguments, train_dataset=_rows("bert"), callbacks=[pruning]).train()  # type: ignore[arg-type]
    weights = prunable(model)
    total = sum(weight.numel() for weight in weights.values())
    assert 0.9 - 2 / total <= sparsity(weights) <= 0.9


def test_a_dense_model_has_no_zeros_to_store() -> None:
    with pytest.raises(SecateurError, match="prune the model first"):
        secateur.sparsify(tiny_model("bert"))  # type: ignore[arg-type]


def test_a_budget_counts_all_maps_also_if_some_may_not_go() -> None:
    method = secateur.Mgpp(**MGPP, weights="intermediate|output.dense")
    result = compress(tiny_model("bert"), method, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="sparsity>=50%")
    weights = prunable(result.model)
    assert 0.5 <= sparsity(weights) <= 0.5 + 3 / sum(weight.numel() for weight in weights.values())
    assert result.budget["terms"][0]["reached"] == pytest.approx(sparsity(weights))
    assert all(bool(weight.all()) for name, weight in weights.items() if "query" in name)


def test_a_sparse_model_is_pruned_and_stored_again(tmp_path: Path) -> None:
    method = secateur.Mgpp(**MGPP)
    once = compress(tiny_model("bert"), method, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="sparsity>=50%")
    twice = compress(
        once.model, method, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="sparsity>=70%", out=tmp_path / "out"
    )
    assert sparsity(prunable(twice.model)) >= 0.7
    assert len(twice.edits) == 1
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    secateur.sparsify(again, "int8").save_pretrained(tmp_path / "int8")
    assert [edit.to_dict()["values"] for edit in hub.edits_of(again)] == ["int8"]
    assert 0.7 <= sparsity(prunable(hub.open_model(tmp_path / "int8"))) < 0.75


@pytest.mark.parametrize("new_head", [False, True])
def test_finetuning_and_late_keep_zeros(new_head: bool, tmp_path: Path) -> None:
    sparse_bert().save_pretrained(tmp_path / "sparse")
    tiny_tokenizer().save_pretrained(tmp_path / "sparse")
    model = (AutoModel if new_head else AutoModelForSequenceClassification).from_pretrained(tmp_path / "sparse")
    zeros = sparsity(prunable(model))
    before = [weight.detach().clone() for weight in prunable(model).values()]
    folder = secateur.finetune(
        model, tiny_tokenizer(), tiny_task(), tmp_path / "tuned", epochs=1, lr=1e-2, batch_size=16, max_length=32
    )
    tuned = hub.open_model(folder)
    weights = prunable(tuned)
    assert sparsity(weights) == zeros
    assert not any(torch.equal(a, b) for a, b in zip(before, weights.values(), strict=True))
    grads = [weight._backward_hooks for weight in prunable(model).values()]
    assert not any(grads)  # let go again
    late = secateur.Late(train_speedup=1.5, epochs=1, batch_size=16, examples=8, lr=1e-2)
    result = compress(tuned, late, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="speedup>=1.5")
    assert sparsity(prunable(result.model)) == zeros


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_what_is_judged_is_what_is_stored(values: Any, tmp_path: Path) -> None:
    method = secateur.Mgpp(**MGPP, values=values)
    result = compress(tiny_model("bert"), method, task=tiny_task(), tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = {"input_ids": torch.randint(5, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, result.model(**batch).logits, atol=1e-5, rtol=1e-5)


def _stepped(steps: list[int], **settings: Any) -> dict[int, float]:
    """What the prior adds to the gradient of one weight of 1, times N, at some of 100 steps."""
    model: Any = tiny_model("bert")
    pruning = Pruning(0.5, PruningSettings(**settings), examples=4)
    state, control = TrainerState(max_steps=100, global_step=0), TrainerControl()
    arguments = TrainingArguments("unused", use_cpu=True, report_to="none")
    pruning.on_train_begin(arguments, state, control, model=model)
    weight = next(iter(pruning.parameters.values()))
    found = {}
    for step in steps:
        state.global_step = step
        with torch.no_grad():
            weight.fill_(1.0)
        weight.grad = torch.zeros_like(weight)
        pruning.on_pre_optimizer_step(arguments, state, control)
        found[step] = 4 * float(weight.grad[0, 0])
    return found


def test_the_prior_is_annealed_and_ends_with_pruning() -> None:
    # a weight of 1 lies in the slab, where the pull is w/v1, as long as the slab is much likelier there
    base = dict(before=0.2, after=0.1, spike=0.01, slab=0.5)
    steady = _stepped([0, 50, 89, 90], **base, anneal="none")
    assert steady == pytest.approx({0: 2.0, 50: 2.0, 89: 2.0, 90: 0.0}, abs=1e-5)
    rising = _stepped([0, 5, 10, 20, 89, 90], **base, anneal="strength")
    assert rising == pytest.approx({0: 0.0, 5: 0.5, 10: 1.0, 20: 2.0, 89: 2.0, 90: 0.0}, abs=1e-5)
    # with v0 = 0.25 and v1 = 0.5 the share of the spike counts: λ falls from 0.5 to 0.05
    wide = dict(before=0.2, after=0.1, spike=0.25, slab=0.5, slab_share=0.5, slab_last=0.1)
    falling = _stepped([0, 20, 89], **wide)

    def pull(slab_share: float) -> float:
        narrow, broad = (1 - slab_share) / 0.25**0.5 * math.exp(-2), slab_share / 0.5**0.5 * math.exp(-1)
        return (4 * narrow + 2 * broad) / (narrow + broad)

    assert falling == pytest.approx({0: pull(0.5), 20: pull(0.5), 89: pull(0.05)}, rel=1e-5)


def test_a_callback_starts_anew(tmp_path: Path) -> None:
    pruning = Pruning(0.5, PruningSettings(score="movement", interval=1))
    for _ in range(2):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        Trainer(tiny_model("bert"), arguments, train_dataset=_rows("bert"), callbacks=[pruning]).train()  # type: ignore[arg-type]
        assert pruning.history[0]["sparsity"] == pytest.approx(0.3, abs=1e-3)
        assert len(pruning.history) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 500}, "unset load_best_model_at_end"),
        ({"fsdp": "full_shard"}, "train without DeepSpeed and FSDP"),
    ],
)
def test_trainers_that_would_end_otherwise(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to="none")
    for name, value in options.items():
        setattr(arguments, name, value)
    with pytest.raises(SecateurError, match=message):
        Pruning(0.5).on_train_begin(arguments, TrainerState(), TrainerControl(), model=tiny_model("bert"))


@pytest.mark.parametrize("typo", [{"score": "mgpp"}, {"anneal": "slabs"}, {"before": -1}, {"floor": 7.0}])
def test_settings_of_the_callback_are_checked(typo: dict[str, Any]) -> None:
    with pytest.raises(SecateurError, match=f"pruning: {next(iter(typo))} is"):
        PruningSettings(**typo)


def test_a_trainer_with_a_loss_of_its_own_evaluates_and_logs(tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []

    class Writer(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no"
    )
    trainer = secateur.CompressionTrainer(
        tiny_model("bert"), arguments, train_dataset=_rows("bert"), eval_dataset=_rows("bert"), callbacks=[Writer()],
        objective=distilled(tiny_model("bert"), 0.5), pruning=Pruning(0.5, PruningSettings(interval=1)),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    assert any("sparsity" in row and "spike_over_lr" in row for row in logged)
    assert trainer.evaluate()["eval_loss"] > 0


def test_structured_methods_take_no_sparsity() -> None:
    with pytest.raises(InvalidBudget, match="optin takes no 'sparsity' budget"):
        compress(tiny_model("bert"), "optin", task=tiny_task(), tokenizer=tiny_tokenizer(), budget="sparsity>=50%")


def test_no_rows_to_train_on(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to="none")
    pruning = Pruning(0.5, examples=0)
    with pytest.raises(InvalidData, match="give Pruning\\(examples=\\)"):
        Pruning(0.5).on_train_begin(arguments, TrainerState(), TrainerControl(), model=tiny_model("bert"))
    with pytest.raises(InvalidData, match="needs training rows: there are none"):
        Trainer(tiny_model("bert"), arguments, train_dataset=_rows("bert"), callbacks=[pruning]).train()  # type: ignore[arg-type]
