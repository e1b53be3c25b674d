"""Contract of BiT: families end binary, a killed run resumes to the same bits, teachers and losses."""

from __future__ import annotations

import copy
import os
import re
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
from torch.nn.functional import kl_div, mse_loss
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import secateur
from secateur import hub
from secateur.bits.modules import BinaryLinear
from secateur.bits.quantizers import binarized
from secateur.costs.budget import Budget, constraints
from secateur.errors import InvalidBudget, SecateurError
from secateur.run import Job
from secateur.tasks import batches
from secateur.train import CompressionTrainer, KeepBest, Settings, distilled, fit, imitated
from tests.conftest import ENCODERS, in_processes, tiny_batch, tiny_model
from tests.contract.test_bits import BINARY, logits
from tests.contract.test_methods import WORDS, compress, tiny_task, tiny_tokenizer
from tests.unit.test_tagging import tagged, tiny_tagger

BIT: dict[str, Any] = dict(epochs=2, lr=1e-3, batches=1)


@pytest.mark.parametrize("family", [name for name in ENCODERS if name in BINARY])
def test_every_family_ends_binary(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(model, secateur.Bit(**BIT), task=tiny_task(), tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (term,) = result.budget["terms"]
    assert (term["kind"], term["met"], term["reached"]) == ("bits", True, 1.0)
    assert [edit["type"] for edit in result.edits] == ["binarize"]
    assert result.after.bytes < 0.45 * result.before.bytes
    batch = tiny_batch(family)
    again = hub.open_model(tmp_path / "out")
    assert torch.equal(logits(again, batch), logits(result.model, batch))
    assert torch.equal(logits(secateur.packed_twin(again), batch), logits(again, batch))


@pytest.mark.parametrize(
    ("settings", "budget", "bits"),
    [
        ({"through": None}, "bits<=1", {1}),
        ({"through": "8,4"}, "bits<=2", {2}),
        ({"through": "4,2", "mixed": ".=1, :probs=4"}, "bits<=4", {1, 4}),
        ({"distill": False, "elastic": False, "through": None}, "bits<=1", {1}),
        ({"two_sets": False, "relu": False, "rows": True, "embeddings": "int8"}, "bits<=1", {1}),
    ],
)
def test_settings(settings: dict[str, Any], budget: str, bits: set[int]) -> None:
    method = secateur.Bit(**{**BIT, "epochs": 1, **settings})
    result = compress(tiny_model("bert"), method, task=tiny_task(), tokenizer=tiny_tokenizer(), budget=budget)
    (edit,) = result.edits
    assert set(edit["bits"].values()) == bits
    assert result.budget["terms"][0]["met"]
    dense = next(module for module in result.model.modules() if isinstance(module, BinaryLinear))
    assert dense.input_bits.alpha.requires_grad  # training on is not held back
    shifted = any(m.input_bits.shift.any() for m in result.model.modules() if isinstance(m, BinaryLinear))
    assert bool(shifted) == settings.get("elastic", True)


def test_a_mixed_model_trains_and_runs_on_whole_numbers(tmp_path: Path) -> None:
    bits = {".": 1, "intermediate": 2, ":probs": 4, r"layer\.1\.output": 8}
    method = secateur.Bit(**BIT, mixed=",".join(f"{name}={count}" for name, count in bits.items()))
    model = tiny_model("bert")
    result = compress(model, method, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="bits<=8", out=tmp_path / "o")
    (edit,) = result.edits
    for site, count in edit["bits"].items():
        assert count == next(bits[name] for name in reversed(bits) if re.search(name, site))
    assert set(edit["bits"].values()) == {1, 2, 4, 8}
    again, batch = hub.open_model(tmp_path / "o"), tiny_batch("bert")
    assert torch.equal(logits(again, batch), logits(result.model, batch))
    assert torch.equal(logits(secateur.packed_twin(again), batch), logits(again, batch))


@pytest.mark.parametrize("kind", ["regression", "tags"])
@pytest.mark.parametrize("distill", [True, False])
def test_other_heads_are_trained(kind: str, distill: bool, tmp_path: Path) -> None:
    model: Any = tiny_model("bert", num_labels=1, problem_type="regression") if kind == "regression" else tiny_tagger(0)
    rows = {"text": [" ".join(WORDS[i : i + 6]) for i in range(60)], "score": [i / 60 for i in range(60)]}
    task = secateur.load_task(Dataset.from_dict(rows) if kind == "regression" else tagged(60))
    method = secateur.Bit(**{**BIT, "through": None, "distill": distill})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(model, method, task=task, tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    assert result.task["metric"] == ("spearman" if kind == "regression" else "entity_f1")
    moved = result.model.state_dict()
    assert not torch.equal(moved["classifier.weight"], before["classifier.weight"])  # the loss reaches every head
    again, batch = hub.open_model(tmp_path / "out", type(model)), tiny_batch("bert")
    assert torch.equal(logits(again, batch), logits(result.model, batch))


def _compress(model: Path, out: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
    code = f"""
import torch; torch.set_num_threads(1)
import secateur, secateur.train.loop
secateur.train.loop.CHECKPOINT_SECONDS = 0
from tests.contract.test_bit import BIT
from tests.contract.test_methods import tiny_task
method = secateur.Bit(**{{**BIT, "epochs": 4}})
secateur.compress({str(model)!r}, method, task=tiny_task(200), out={str(out)!r}, resume={resume}, seconds=0.05)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def test_killed_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL in the second step, in the middle of an epoch; weights and scales end the same, bit by bit."""
    tiny_model("bert").save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert _compress(tmp_path / "dense", tmp_path / "whole").wait(300) == 0
    run = _compress(tmp_path / "dense", tmp_path / "out")
    checkpoints = tmp_path / "out.run" / "step 2 of 2, 1 bits"
    deadline = time.monotonic() + 300

    def reached() -> int:
        found = [int(path.parent.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*/complete")]
        return max(found, default=0)

    while reached() < 20 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    last = _compress(tmp_path / "dense", tmp_path / "out", resume=True)
    assert last.wait(300) == 0, last.stderr.read()  # type: ignore[union-attr]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_loss_by_hand() -> None:
    teacher: Any = tiny_model("bert")
    student: Any = tiny_model("bert", seed=1)
    batch = tiny_batch("bert") | {"labels": torch.tensor([0, 1, 0])}
    found = float(imitated(teacher)(student, batch).detach())
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        mine, goal = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    p = goal.logits.softmax(-1)
    cross = -(p * mine.logits.log_softmax(-1)).mean()
    entropy = -(p * goal.logits.log_softmax(-1)).mean()
    real = batch["attention_mask"].bool()
    states = sum(
        float((a[real] - b[real]).square().mean()) for a, b in zip(mine.hidden_states, goal.hidden_states, strict=True)
    )
    assert len(mine.hidden_states) == 4  # the embeddings and three layers
    assert found == pytest.approx(float(cross - entropy) + states, rel=1e-5)
    assert float(imitated(teacher)(teacher, batch)) == pytest.approx(0, abs=1e-6)


def test_one_output_has_a_gradient_and_the_teacher_no_dropout() -> None:
    teacher: Any = tiny_model("bert", num_labels=1).train()
    student: Any = tiny_model("bert", seed=1, num_labels=1)
    batch = tiny_batch("bert") | {"labels": torch.tensor([0.5, 1.0, 2.0])}
    objective = imitated(teacher)
    first, second = objective(student, batch), objective(student, batch)
    assert torch.equal(first, second)
    first.backward()
    assert float(student.classifier.weight.grad.abs().sum()) > 0


def test_distillation_comes_nearer_to_the_teacher_than_its_labels() -> None:
    """One-bit students after as many steps with the teacher's outputs and states, and with its classes alone."""
    teacher: Any = tiny_model("bert")
    batch = next(iter(batches(tiny_task(64), "train", tiny_tokenizer(), batch_size=64)))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    wanted = logits(teacher, inputs)
    objective = imitated(teacher)
    distances = {}
    for distils in (True, False):
        student: Any = tiny_model("bert")
        secateur.binarize(student, [inputs], calibration="search")
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        for _ in range(40):
            loss = (
                objective(student, batch)
                if distils
                else torch.nn.functional.cross_entropy(student(**inputs).logits, wanted.argmax(-1))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        distances[distils] = float((logits(student, inputs).softmax(-1) - wanted.softmax(-1)).square().mean())
    assert distances[True] < 0.5 * distances[False]


def test_starts_and_ends_of_answers_are_both_compared() -> None:
    config = tiny_model("bert").config
    teacher = AutoModelForQuestionAnswering.from_config(config)
    student = AutoModelForQuestionAnswering.from_config(config).eval()
    assert not torch.equal(teacher.qa_outputs.weight, student.qa_outputs.weight)
    objective = imitated(teacher)
    batch = tiny_batch("bert")
    loss = objective(student, batch)
    mine, wanted = (net(**batch, output_hidden_states=True) for net in (student, teacher))
    expected = sum(
        kl_div(mine[f"{end}_logits"].log_softmax(1), wanted[f"{end}_logits"].softmax(1), reduction="batchmean") / 9
        for end in ("start", "end")
    )
    real = batch["attention_mask"].bool()
    for one, other in zip(mine.hidden_states, wanted.hidden_states, strict=True):
        expected = expected + mse_loss(one[real], other[real])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert bool((student.qa_outputs.weight.grad.abs().sum(dim=1) > 0).all())
    assert float(objective(teacher, batch)) == pytest.approx(0, abs=1e-6)
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(SecateurError, match="several labels"):
        objective(student, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_labels": 3}, "num_labels 3, the student 2"), ({"vocab_size": 120}, "vocab_size 120, the student 99")],
)
def test_another_teacher_is_refused(change: dict[str, int], message: str) -> None:
    student: Any = tiny_model("bert")
    with pytest.raises(SecateurError, match=message):
        imitated(tiny_model("bert", **change))(student, tiny_batch("bert"))  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
def test_a_teacher_with_another_head_is_refused(head: Any) -> None:
    """Also where the shapes would broadcast: 9 rows of 9 tokens."""
    student, teacher = tiny_model("bert"), head.from_config(tiny_model("bert").config)
    batch = tiny_batch("bert", batch=9) | {"labels": torch.zeros(9, dtype=torch.long)}
    for objective in (imitated(teacher), distilled(teacher, 0.5)):
        with pytest.raises(SecateurError, match=r"outputs are .*distil from a model with the same head"):
            objective(student, batch)
    words = AutoModelForTokenClassification.from_config(tiny_model("bert").config)
    with pytest.raises(SecateurError, match="need labels"):
        imitated(words)(words, tiny_batch("bert"))


def test_each_step_begins_with_the_one_before_and_learns_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, teachers, starts, ends = tiny_batch("bert"), [], [], []
    usual_imitated, usual_trained = secateur.methods.bit.imitated, Job.trained

    def spied(teacher: Any) -> Any:
        teachers.append(logits(teacher.eval(), batch))
        return usual_imitated(teacher)

    def trained(job: Job, model: Any, *args: Any, **kwargs: Any) -> Any:
        starts.append(model.bert.encoder.layer[0].output.dense.weight.detach().clone())
        found = usual_trained(job, model, *args, **kwargs)
        ends.append((logits(model, batch), model.bert.encoder.layer[0].output.dense.weight.detach().clone()))
        return found

    monkeypatch.setattr("secateur.methods.bit.imitated", spied)
    monkeypatch.setattr(Job, "trained", trained)
    model: Any = tiny_model("bert")
    dense = logits(model, batch), model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    method = secateur.Bit(**{**BIT, "epochs": 1, "through": "4,2"})
    compress(model, method, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="bits<=1")
    assert len(teachers) == len(starts) == 3
    for step, (wanted, weight) in enumerate((dense, *ends[:2])):
        assert torch.equal(teachers[step], wanted)
        assert torch.equal(starts[step], weight)
    assert not torch.equal(starts[0], starts[1])


@pytest.mark.parametrize(
    ("through", "mixed", "steps"),
    [("4,2", None, [4, 2, 1]), ("8,2", ".=1, :probs=4", [8, 2, 4]), (2, ".=2, :probs=4", [4]), (None, None, [1])],
)
def test_steps_before_the_last_have_more_bits_than_its_lowest(
    through: Any, mixed: str | None, steps: list[int]
) -> None:
    model: Any = tiny_model("bert")
    limits = constraints(Budget.parse(f"bits<={steps[-1]}"), model, units=False)
    method = secateur.Bit(**BIT, through=through, mixed=mixed)
    assert method._steps(model, limits) == steps


def test_scales_have_a_rate_of_their_own_and_do_not_decay(tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    secateur.binarize(model, [tiny_batch("bert")])
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True, report_to="none")
    optimizer = CompressionTrainer(model, arguments, scale_lr=2e-5).create_optimizer()
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(1 for _ in model.parameters())
    for name, parameter in model.named_parameters():
        rate = 2e-5 if name.endswith(".alpha") else 1e-3
        plain = name.endswith((".alpha", ".shift", ".bias")) or "LayerNorm" in name
        assert found[id(parameter)] == (rate, 0.0 if plain else 0.1), name


def test_the_rate_of_a_scale_follows_the_micro_batch(tmp_path: Path) -> None:
    """Two micro-batches of half the rows give √2 times the gradient of α, and the same for weights and shifts."""
    batch = tiny_batch("bert", batch=8)
    model: Any = tiny_model("bert")
    secateur.binarize(model, [batch])
    model.eval()
    found = []
    for parts in (1, 2):
        model.zero_grad()
        for part in range(parts):
            rows = {name: tensor.chunk(parts)[part] for name, tensor in batch.items()}
            (model(**rows).logits.square().mean() / parts).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, once in found[0].items():
        factor = 2**0.5 if name.endswith(".alpha") else 1.0
        torch.testing.assert_close(found[1][name], factor * once, rtol=1e-3, atol=1e-6)


def test_any_trainer_distils_a_binary_model(tmp_path: Path) -> None:
    batch = tiny_batch("bert", batch=8) | {"labels": torch.arange(8) % 2}
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(8)]
    teacher: Any = tiny_model("bert")
    student: Any = tiny_model("bert")
    secateur.binarize(student, [tiny_batch("bert")])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=2e-3, report_to="none", use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = CompressionTrainer(student, arguments, train_dataset=rows, objective=imitated(teacher))  # type: ignore[arg-type]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_any_trainer_resumes_with_latent_weights(tmp_path: Path) -> None:
    batch = tiny_batch("bert", batch=8) | {"labels": torch.arange(8) % 2}
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(8)]
    ends = []
    for stops in (None, 4):
        model: Any = tiny_model("bert")
        secateur.binarize(model, [tiny_batch("bert")])

        def trainer(net: Any, folder: str) -> CompressionTrainer:
            arguments = TrainingArguments(
                str(tmp_path / folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=4,
                report_to="none", use_cpu=True,
            )  # fmt: skip
            return CompressionTrainer(net, arguments, train_dataset=rows)  # type: ignore[arg-type]

        one = trainer(model, str(stops))
        assert not [name for name in one.get_decay_parameter_names(model) if "_bits" in name]
        one.train()
        if stops:
            model = tiny_model("bert")
            secateur.binarize(model, [tiny_batch("bert")])
            trainer(model, str(stops)).train(resume_from_checkpoint=str(tmp_path / str(stops) / f"checkpoint-{stops}"))
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    model = tiny_model("bert")
    secateur.binarize(model, [tiny_batch("bert")])
    trainer(model, "another").train(resume_from_checkpoint=str(tmp_path / "4" / "checkpoint-4"))
    assert all(torch.equal(tensor, ends[0][name]) for name, tensor in model.state_dict().items())
    (tmp_path / "4" / "checkpoint-4" / "latent.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"latent.safetensors is missing"):
        trainer(model, "4").train(resume_from_checkpoint=str(tmp_path / "4" / "checkpoint-4"))


PARALLEL = """
import os
import sys
from pathlib import Path
import torch; torch.set_num_threads(1)
import torch.distributed as dist
from safetensors.torch import save_file
import secateur
from secateur.tasks import evaluate
from secateur.train import KeepBest, Settings, fit, imitated
from tests.conftest import tiny_batch, tiny_model
from tests.contract.test_methods import tiny_task, tiny_tokenizer

model, teacher, task = tiny_model("bert"), tiny_model("bert"), tiny_task(80)
secateur.binarize(model, [tiny_batch("bert")])
seen = []
model.register_forward_pre_hook(lambda m, args, given: seen.append(given["input_ids"].sum().item()), with_kwargs=True)
scores = iter([0.2, 0.9, 0.1])
best = KeepBest(lambda net: next(scores), Path(sys.argv[1]) / f"run-{os.environ['RANK']}")
settings = Settings(3, 1e-3, 8, 32, 0.1, 0.01, 0, None, False, scale_lr=1e-4)
fit(model, tiny_tokenizer(), task, Path(sys.argv[1]) / "run", settings, objective=imitated(teacher), callbacks=[best])
last = {f"last {name}": tensor.clone() for name, tensor in model.state_dict().items()}
best.restore(model)
assert dist.get_world_size() == 2
kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
save_file(kept | last | {"seen": torch.tensor(seen)}, f"{sys.argv[1]}/{dist.get_rank()}.safetensors")
"""


def test_two_processes_end_with_the_best_epoch(tmp_path: Path) -> None:
    """Data parallel over gloo: each process sees its own half of the rows, and both end with one model."""
    in_processes(2, PARALLEL, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert not torch.equal(first.pop("seen"), second.pop("seen"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    weight = "classifier.weight"
    best = load_file(tmp_path / "run-0" / "best.safetensors")[weight]
    assert torch.equal(first[weight], best)
    assert not torch.equal(first[f"last {weight}"], best)


def test_an_epoch_is_judged_though_a_kill_came_after_its_last_step(tmp_path: Path) -> None:
    keep = KeepBest(lambda model: 0.7, tmp_path / "run")
    state, arguments = TrainerState(global_step=8, max_steps=16), TrainingArguments(str(tmp_path), num_train_epochs=4)
    keep.on_train_begin(arguments, state, TrainerControl(), model=tiny_model("bert"))
    assert keep.scores == {"8": 0.7}
    again = KeepBest(lambda model: 0.1, tmp_path / "run")
    again.on_train_begin(arguments, state, TrainerControl(), model=tiny_model("bert"))
    assert again.scores == {"8": 0.7}
    state.global_step = 9
    again.on_train_begin(arguments, state, TrainerControl(), model=tiny_model("bert"))
    assert again.scores == {"8": 0.7}


def test_autocast_does_not_stay_on_a_trained_model(tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    fit(model, tiny_tokenizer(), tiny_task(16), tmp_path, Settings(1, 1e-3, 16, 64, 0.1, 0.0, 0, 0.0, True))
    assert "forward" not in model.__dict__
    batch = tiny_batch("bert")
    twin: Any = copy.deepcopy(tiny_model("bert"))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, batch), logits(twin, batch))


def test_what_does_not_fit_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.run.fit", lambda *args, **kwargs: pytest.fail("it trains"))
    for mixed in ("decoder=1", "(=1", ":probs=3"):
        with pytest.raises(SecateurError):
            compress(
                tiny_model("bert"), secateur.Bit(mixed=mixed), task=tiny_task(), tokenizer=tiny_tokenizer(),
                budget="bits<=4",
            )  # fmt: skip


def test_frozen_weights_are_refused() -> None:
    model: Any = tiny_model("bert")
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    with pytest.raises(SecateurError, match="layer.0.output.dense.weight is frozen"):
        compress(model, secateur.Bit(**BIT), task=tiny_task(), tokenizer=tiny_tokenizer(), budget="bits<=1")


def test_compress_is_refused_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SecateurError, match=r"one process.*CompressionTrainer"):
        compress(tiny_model("bert"), "optin", task=tiny_task(), tokenizer=tiny_tokenizer())


def test_other_methods_refuse_a_binary_model() -> None:
    model: Any = tiny_model("bert")
    secateur.binarize(model, [tiny_batch("bert")])
    for method in (secateur.Mgpp(epochs=1), secateur.Optin(batches=1)):
        with pytest.raises(SecateurError, match="binarize it last"):
            compress(model, method, task=tiny_task(), tokenizer=tiny_tokenizer())
    model.bert.encoder.layer[0].output.dense.weight.data[0] = 0
    with pytest.raises(SecateurError, match="binarize it last"):
        secateur.sparsify(model)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_binary_model_is_trained_to_hand_on_fewer_tokens(family: str, tmp_path: Path) -> None:
    """From its folder, or alive: bits stay, and the dial meets its budget."""
    made = compress(tiny_model(family), secateur.Bit(**BIT), task=tiny_task(), tokenizer=tiny_tokenizer())
    made.model.save_pretrained(tmp_path / "bits")
    late = secateur.Late(train_speedup=2.0, epochs=1, lr=1e-3, batch_size=16, examples=32)
    batch = tiny_batch(family)
    for number, source in enumerate((hub.open_model(tmp_path / "bits"), made.model)):
        out = tmp_path / f"out{number}"
        result = compress(source, late, task=tiny_task(), tokenizer=tiny_tokenizer(), out=out)
        assert result.budget["terms"][0]["met"]
        assert [edit.type for edit in hub.edits_of(result.model)] == ["binarize", "drop_tokens"]
        again: Any = hub.open_model(out)
        assert again.secateur.speedup >= 2
        assert torch.equal(logits(again, batch), logits(result.model, batch))
        torch.testing.assert_close(logits(secateur.packed_twin(again), batch), logits(again, batch), atol=1e-6, rtol=0)
        with secateur.runtime.load(again) as engine:
            ids = [row[row != 0].tolist() for row in batch["input_ids"] * batch["attention_mask"]]
            torch.testing.assert_close(engine(ids), logits(again, batch), atol=1e-5, rtol=0)


def test_a_model_with_a_dial_becomes_binary(tmp_path: Path) -> None:
    """It is trained at 1; the dial stays, and turns."""
    late = secateur.Late(train_speedup=2.0, epochs=1, lr=1e-3, batch_size=16, examples=32)
    made = compress(tiny_model("bert"), late, task=tiny_task(), tokenizer=tiny_tokenizer())
    out = tmp_path / "out"
    result = compress(made.model, secateur.Bit(**BIT), task=tiny_task(), tokenizer=tiny_tokenizer(), out=out)
    again: Any = hub.open_model(out)
    batch = tiny_batch("bert")
    assert [edit.type for edit in hub.edits_of(again)] == ["drop_tokens", "binarize"]
    assert again.secateur.speedup == 1
    assert torch.equal(logits(again, batch), logits(result.model, batch))
    dense = logits(again, batch)
    again.secateur.speedup = 2
    assert not torch.equal(logits(again, batch), dense)


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    scores = iter([0.5, 0.9, 0.9, 0.3])
    keep = KeepBest(lambda model: next(scores), tmp_path / "run")
    model: Any = tiny_model("bert")
    secateur.binarize(model, [tiny_batch("bert")])
    rows = [{name: tensor[i] for name, tensor in tiny_batch("bert").items()} | {"labels": i % 2} for i in range(3)]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=3, learning_rate=1e-3, report_to="none",
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    seen = []

    class Record(KeepBest):
        def on_epoch_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(model.bert.encoder.layer[0].output.dense.weight.detach().clone())

    callbacks = [keep, Record(lambda model: 0.0, tmp_path)]
    CompressionTrainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()  # type: ignore[arg-type]
    keep.restore(model)
    weight = model.bert.encoder.layer[0].output.dense.weight
    assert torch.equal(weight, seen[1])  # the first of the two best, with its latent weights
    assert binarized(weight)[0].unique().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("settings", "budget", "message"),
    [
        ({"through": 3}, None, "through has falling bits"),
        ({"through": "2,4"}, None, "through has falling bits"),
        ({"through": "two"}, None, "through is such as 2"),
        ({"mixed": "probs"}, None, "mixed is such as"),
        ({"embeddings": "int4"}, None, "embeddings is float or int8 or 1bit"),
        ({"lr": -1.0}, None, "lr is a number from 0"),
        ({"mixed": ":probs=4"}, "bits<=1", "mixed has :probs=4, above the budget"),
        ({"mixed": "decoder=1"}, "bits<=1", "'decoder' fits no site"),
        ({}, "bits<=0.5", "out of reach"),
        ({}, "bits<=50%", "needs a unit"),
        ({}, "macs<=50%", "takes no 'macs' budget"),
        ({}, "bits<=64", "meets bits<=64"),
    ],
)
def test_bad_settings(settings: dict[str, Any], budget: str | None, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        compress(
            tiny_model("bert"), secateur.Bit(**settings), task=tiny_task(), tokenizer=tiny_tokenizer(), budget=budget
        )
    if "reach" in message:
        with pytest.raises(InvalidBudget, match=message):
            compress(tiny_model("bert"), secateur.Bit(), task=tiny_task(), tokenizer=tiny_tokenizer(), budget=budget)
