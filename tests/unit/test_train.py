"""Fine-tuning: learns, resumes to the same weights after SIGKILL, leaves a whole folder or none."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, TrainerCallback

from secateur.edits import Slice, apply_edits
from secateur.errors import InvalidData, InvalidModel, SecateurError
from secateur.hub import attach, save_model
from secateur.subnetwork import SubNetwork
from secateur.tasks import evaluate, load_task
from secateur.tasks.batching import BucketSampler
from secateur.train import Settings, bf16_pays, distilled, finetune, fit, last_checkpoint, output_distance
from secateur.train.precision import bf16_products
from tests.unit import tiny_text

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_text.model(num_labels=3).save_pretrained(folder)
    tiny_text.tokenizer().save_pretrained(folder)
    return folder


def test_killed_run_resumes_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    whole = finetune(base, None, tiny_text.task(), tmp_path / "whole", **tiny_text.SETTINGS)
    command = [sys.executable, "-m", "tests.unit.tiny_text", str(base), str(tmp_path / "killed"), "8"]
    paths = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    assert not (tmp_path / "killed").exists()
    run = tmp_path / "killed.run"
    assert last_checkpoint(run) == run / "checkpoint-8"
    (run / "checkpoint-8" / "complete").unlink()  # as if killed while it was written
    (run / "checkpoint-8" / "model.safetensors").write_bytes(b"half")

    resumed = finetune(base, None, tiny_text.task(), tmp_path / "killed", **tiny_text.SETTINGS, resume=True)

    one, other = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not run.exists()


def test_learns_and_the_folder_opens_with_labels(base: Path, tmp_path: Path) -> None:
    task = tiny_text.task(train=200)
    settings = tiny_text.SETTINGS | {"epochs": 8, "lr": 5e-3, "dropout": 0.0, "batch_size": 16}
    out = finetune(base, None, task, tmp_path / "out", **settings)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.problem_type == "single_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.backend_tokenizer.truncation is None
    assert evaluate(model, tokenizer, task).metrics["accuracy"] > 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_live_model_keeps_a_head_that_fits_and_its_dropout(tmp_path: Path) -> None:
    net = tiny_text.model(num_labels=2)
    head = net.classifier
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
            seen.append(model.dropout.p)

    arguments = tiny_text.SETTINGS | {"epochs": 1}
    finetune(net, tiny_text.tokenizer(), tiny_text.task(), tmp_path / "o", **arguments, dropout=0.0, callbacks=[Look()])
    assert net.classifier is head
    assert set(seen) == {0.0}
    assert net.dropout.p == 0.1
    assert not net.training


def test_body_gets_a_regression_head(tmp_path: Path) -> None:
    body = BertModel(tiny_text.model().config)
    texts, labels = tiny_text.sentences(16)
    rows = Dataset.from_dict({"text": texts, "score": [float(label == "good") for label in labels]})
    task = load_task(DatasetDict(train=rows, validation=rows))
    out = finetune(body, tiny_text.tokenizer(), task, tmp_path / "out", **tiny_text.SETTINGS)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, body.embeddings.word_embeddings.weight)


def test_result_is_not_written_over_and_finished_run_is_returned(base: Path, tmp_path: Path) -> None:
    arguments = tiny_text.SETTINGS | {"epochs": 1}
    out = finetune(base, None, tiny_text.task(), tmp_path / "out", **arguments)
    written = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(SecateurError, match="already exists"):
        finetune(base, None, tiny_text.task(), out, **arguments)
    with pytest.raises(SecateurError, match="already exists"):
        finetune(base, None, tiny_text.task(), out, **(arguments | {"lr": 2e-3}), resume=True)
    assert finetune(base, None, tiny_text.task(), out, **arguments, resume=True) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_resume_refuses_other_settings(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "out.run"
    run.mkdir()
    (run / "finetune.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(SecateurError, match="other settings"):
        finetune(base, None, tiny_text.task(), tmp_path / "out", **tiny_text.SETTINGS, resume=True)


def test_divergence_is_an_error_and_leaves_no_result(tmp_path: Path) -> None:
    net = tiny_text.model()
    with torch.no_grad():
        net.classifier.weight.fill_(float("nan"))
    with pytest.raises(InvalidModel, match="diverged"):
        finetune(net, tiny_text.tokenizer(), tiny_text.task(), tmp_path / "out", **(tiny_text.SETTINGS | {"epochs": 1}))
    assert not (tmp_path / "out").exists()


def test_sliced_folder_trains_on_and_stays_sliced(tmp_path: Path) -> None:
    net = tiny_text.model()
    kept = SubNetwork(((False, False), (True, False)), ((True, False) * 12, (True,) * 24))
    cut = [Slice(kept)]
    apply_edits(net, cut)
    attach(net, cut)
    save_model(tmp_path / "sliced", net, tiny_text.tokenizer())
    settings = tiny_text.SETTINGS | {"epochs": 1}
    sliced = tmp_path / "sliced"
    out = finetune(sliced, None, tiny_text.task(), tmp_path / "out", **settings, checkpoint_seconds=0)
    again = AutoModelForSequenceClassification.from_pretrained(out)
    assert again.bert.encoder.layer[0].intermediate.dense.out_features == 12
    assert not torch.equal(again.classifier.weight, net.classifier.weight)


def test_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="no usable tokenizer"):
        finetune(tmp_path, None, tiny_text.task(), tmp_path / "out")
    with pytest.raises(InvalidModel, match=r"config\.json"):
        finetune(tmp_path, tiny_text.tokenizer(), tiny_text.task(), tmp_path / "out")
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    only_test = load_task(DatasetDict(test=rows))
    with pytest.raises(InvalidData, match="'train' split"):
        finetune(tiny_text.model(), tiny_text.tokenizer(), only_test, tmp_path / "out")


def test_sampler_covers_rows_once_and_depends_on_the_epoch() -> None:
    lengths = [(7 * i) % 50 for i in range(101)]
    sampler = BucketSampler(lengths, 8, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second
    assert sorted(row for group in second for row in group) == list(range(101))
    assert len(first) == len(sampler) == 13
    spread = [max(lengths[r] for r in group) - min(lengths[r] for r in group) for group in first]
    assert max(spread) <= 8


def test_bf16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, pays in (
        ({}, False),
        ({"avx512_f": True}, False),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": 1}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert bf16_pays() is pays


def test_bf16_products_are_of_steps_only_and_whole_numbers_exact(tmp_path: Path) -> None:
    """Operands 1 + 2⁻⁸ round to 1 where the hardware multiplies in bfloat16; whole numbers up to 256 never do."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(*ends, (300, 1536), generator=generator).float() for ends in ((-128, 257), (-1, 2)))
    x = torch.full((64, 64), 1 + 2**-8)
    exact, wanted = a @ b.T, x @ x
    with bf16_products():
        assert torch.equal(a @ b.T, exact)
        assert (x @ x - wanted).abs().max().item() == (wanted[0, 0].item() - 64 if bf16_pays() else 0)
    assert torch.equal(x @ x, wanted)
    model, precisions = tiny_text.model(), []

    class Seen(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            precisions.append(torch.get_float32_matmul_precision())

    def objective(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        precisions.append(torch.get_float32_matmul_precision())
        loss: torch.Tensor = model(**batch).loss
        return loss

    settings = Settings(1, 1e-4, 40, 32, 0.0, 0.0, 0, None, False, bf16_products=True)
    fit(model, tiny_text.tokenizer(), tiny_text.task(), tmp_path, settings, objective=objective, callbacks=[Seen()])
    assert precisions == ["medium", "highest"]


def test_config_of_the_base_is_untouched(base: Path) -> None:
    assert BertConfig.from_pretrained(base).num_labels == 3


def test_distance_to_a_teacher_by_hand() -> None:
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    # T = 1: the teacher says (3/4, 1/4), the student (1/2, 1/2)
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(output_distance(student, teacher, 1.0)) == pytest.approx(wanted, abs=1e-6)
    # T = 2: odds of √3, and the factor T² = 4
    p = math.sqrt(3) / (1 + math.sqrt(3))
    wanted = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert float(output_distance(student, teacher, 2.0)) == pytest.approx(wanted, abs=1e-6)
    assert float(output_distance(torch.tensor([[1.0]]), torch.tensor([[3.0]]), 2.0)) == 4.0


def test_distilled_loss_mixes_task_and_teacher() -> None:
    net, teacher = tiny_text.model(seed=0), tiny_text.model(seed=1)
    batch = {"input_ids": torch.tensor([[2, 5, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    batch["labels"] = torch.tensor([1])
    with torch.no_grad():
        task_loss = float(net(**batch).loss)
        distance = float(output_distance(net(**batch).logits, teacher(**batch).logits, 2.0))
    assert float(distilled(teacher, 0.25)(net, batch).detach()) == pytest.approx(
        0.75 * task_loss + 0.25 * distance, abs=1e-6
    )
