"""Contract of LATE: budget met, round trip, resume after a kill, the dial's verbs, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.costs.analytic import macs
from secateur.edits.tokens import dial_of
from secateur.errors import InvalidBudget, SecateurError
from secateur.methods.late import Turning
from secateur.subnetwork import SubNetwork
from tests.conftest import in_processes, tiny_model
from tests.contract.test_methods import compress, tiny_task, tiny_tokenizer
from tests.contract.test_tokens import ENCODERS

LATE: dict[str, Any] = dict(train_speedup=2.0, epochs=1, lr=1e-3, batch_size=16, examples=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, secateur.Result]:
    """A tiny BERT with a dial, as a folder and as a result."""
    out = tmp_path_factory.mktemp("late") / "out"
    result = compress(tiny_model("bert"), secateur.Late(**LATE), task=tiny_task(), tokenizer=tiny_tokenizer(), out=out)
    return out, result


def test_budget_is_met_and_the_folder_opens(made: tuple[Path, secateur.Result]) -> None:
    out, result = made
    assert result.budget["text"] == "speedup>=2"
    assert result.budget["terms"][0]["met"] is True
    assert result.after.macs <= result.before.macs / 2
    assert result.predicted["macs"] == result.after.macs
    assert result.after.params == result.before.params
    assert result.after.bytes == (out / "model.safetensors").stat().st_size
    again = AutoModelForSequenceClassification.from_pretrained(out)
    assert dial_of(again).alpha == dial_of(result.model).alpha > 0
    batch = {"input_ids": torch.randint(5, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, result.model(**batch).logits)
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert "model.secateur.speedup" in (out / "README.md").read_text()
    assert "Tokens that leave each layer" in (out / "report.html").read_text()
    assert not (out.parent / "out.run").exists()


@pytest.mark.parametrize("family", ENCODERS)
def test_every_family_with_a_budget_of_macs(family: str) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(
        model, secateur.Late(**LATE), task=tiny_task(), tokenizer=tiny_tokenizer(), budget="macs<=70%", tokens=12
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.after.macs <= 0.7 * result.before.macs
    assert not all(torch.equal(value, before[name]) for name, value in result.model.state_dict().items())
    counted = macs(result.model, 1, 12).of(SubNetwork.full(result.model))
    dial = dial_of(result.model)
    dense = dial.costs.macs(12, [12] * 3)
    # the model counts what the dial's formula says, layer by layer
    assert result.before.macs - counted == pytest.approx(dense - dense / dial.speedup_at(dial.alpha, 12), abs=1)


def test_latency_budget_is_measured_here(made: tuple[Path, secateur.Result]) -> None:
    _, result = made
    dial = dial_of(result.model)
    before = dial.alpha
    dial.latency_budget = "1000ms"
    assert (dial.alpha, dial.latency_budget) == (0.0, 1000.0)  # the dense model is fast enough
    with pytest.raises(InvalidBudget, match="0.0001 ms cannot be met at batch 1 and .* the fastest setting takes"):
        dial.latency_budget = 0.0001
    dial.alpha = before
    assert dial.latency_budget is None


def test_verbs_turn_the_dial(made: tuple[Path, secateur.Result], tmp_path: Path) -> None:
    out, _ = made
    task = tiny_task()
    dense = secateur.measure(out, tokens=16, seconds=0.05, speedup=1)
    fast = secateur.measure(out, tokens=16, seconds=0.05, speedup=2)
    assert dense["macs"] > 1.8 * fast["macs"]
    with pytest.raises(InvalidBudget, match="A speed-up of 99 is beyond this model's reach"):
        secateur.dial(out, task, speedups=(1.5, 99), seconds=0.1)
    assert [row["speedup"] for row in secateur.dial(out, seconds=0.1)["rows"]] == [1.0, 1.5, 2.0, 3.0]
    table = secateur.dial(out, task, speedups=(1.5, 2), seconds=0.1)
    assert [row["speedup"] for row in table["rows"]] == [1.0, 1.5, 2.0]
    assert all(row["theory"] >= row["speedup"] and "accuracy" in row["metrics"] for row in table["rows"])
    assert json.loads((out / "dial.json").read_text())["rows"] == table["rows"]
    assert "Plotly.newPlot" in (out / "dial.html").read_text()
    texts = tmp_path / "validation.csv"
    task.validation.to_csv(texts)  # type: ignore[union-attr]
    run = CliRunner().invoke(app, ["evaluate", str(out), "--task", str(texts), "--speedup", "1,2", "--json"])
    assert [row["speedup"] for row in json.loads(run.stdout.splitlines()[-1])["rows"]] == [1.0, 2.0]
    run = CliRunner().invoke(app, ["dial", str(out), "--seconds", "0.1", "--speedup", "1,2"])
    assert run.exit_code == 0
    assert "speed-up" in run.stdout


def test_turning_ramps_and_then_draws_from_the_range() -> None:
    dial = type("Stub", (), {"alpha": 0.0})()
    steady = Turning(dial, 2.0, 0.5, sandwich=False, seed=0)
    assert [steady.alpha(step, 10) for step in range(7)] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2, 2])
    drawn = Turning(dial, 2.0, 0.5, sandwich=True, seed=0)
    assert [drawn.alpha(step, 10) for step in range(5)] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])
    later = [drawn.alpha(step, 1000) for step in range(500, 1000)]
    assert all(0 <= alpha <= 2 for alpha in later)
    assert 0.2 < sum(alpha == 0 for alpha in later) / 500 < 0.3
    assert 0.2 < sum(alpha == 2 for alpha in later) / 500 < 0.3
    assert later == [drawn.alpha(step, 1000) for step in range(500, 1000)]  # a resumed run draws the same


def test_acc_of_uniform_attention_is_rho() -> None:
    """With query weights of zero every token attends alike: mass(ρ) needs ⌈ρ n⌉ of n tokens."""
    model = tiny_model("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".query." in name:
                parameter.zero_()
    result = compress(
        model,
        secateur.Late(**{**LATE, "acc": "mass", "weighting": "attention", "diagonal": True, "rho": 0.5, "lr": 0.0}),
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget="speedup>=1.5",
    )
    profile = result.edits[0]["profile"]
    assert all(0.5 <= m <= 0.5 + 0.5 / 5 for m in profile)


@pytest.mark.parametrize(
    ("settings", "budget", "message"),
    [
        ({"train_speedup": 1.0}, None, "train_speedup is above 1"),
        ({"ramp": 2.0}, None, "ramp is a share"),
        ({"beta": 1}, None, "beta is a share, from 0 to below 1"),
        ({"least": 0}, None, "least is above 0"),
        ({"dropout": 1.5}, None, "dropout is a share"),
        ({"train_speedup": 20}, None, "train_speedup=20 is beyond this model's reach at 12 tokens, 3.7"),
        ({"acc": "median"}, None, "acc is mass or participation or entropy or count or effect"),
        (
            {},
            "speedup>=200",
            "beyond reach by eliminating tokens. At 12 tokens the nearest feasible budget is speedup>=3.72",
        ),
        ({}, "speedup>=1", "a speed-up is above 1"),
        ({}, "speedup<=3", "write 'speedup>=3'"),
        ({}, "params<=50%", "late takes no 'params' budget: use latency, macs, speedup"),
    ],
)
def test_bad_settings_and_budgets(settings: dict[str, Any], budget: str | None, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        compress(
            tiny_model("bert"),
            secateur.Late(**{**LATE, **settings}),
            task=tiny_task(),
            tokenizer=tiny_tokenizer(),
            budget=budget,
            tokens=12,
        )


def test_structured_methods_take_no_speedup() -> None:
    with pytest.raises(InvalidBudget, match="optin takes no 'speedup' budget"):
        compress(tiny_model("bert"), "optin", task=tiny_task(), tokenizer=tiny_tokenizer(), budget="speedup>=2")


def _compress(model: Path, out: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
    code = f"""
import torch; torch.set_num_threads(1)
import secateur, secateur.train.loop
secateur.train.loop.CHECKPOINT_SECONDS = 0
from tests.contract.test_late import LATE
from tests.contract.test_methods import tiny_task
secateur.compress({str(model)!r}, secateur.Late(**{{**LATE, "epochs": 6}}), task=tiny_task(200), out={str(out)!r},
                  resume={resume}, seconds=0.05)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def test_killed_training_resumes_to_the_same_model(tmp_path: Path) -> None:
    """SIGKILL while it trains; the end is the same, bit by bit."""
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert _compress(tmp_path / "dense", tmp_path / "whole").wait(300) == 0
    run = _compress(tmp_path / "dense", tmp_path / "out")
    checkpoints = tmp_path / "out.run" / "training"
    deadline = time.monotonic() + 300
    while (
        len(list(checkpoints.glob("checkpoint-*/complete"))) < 2 and run.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    assert run.poll() is None  # killed in the middle of the training
    run.send_signal(signal.SIGKILL)
    run.wait()
    last = _compress(tmp_path / "dense", tmp_path / "out", resume=True)
    assert last.wait(300) == 0, last.stderr.read()  # type: ignore[union-attr]
    # tensors, not bytes: safetensors writes its metadata in another order each time
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_control_that_chooses_at_random_keeps_the_same_counts(made: tuple[Path, secateur.Result]) -> None:
    _, result = made
    dial = dial_of(result.model)
    generator = torch.Generator().manual_seed(0)
    usual = dial.selection
    batch = {"input_ids": torch.randint(5, 99, (3, 12), generator=generator)}
    full = SubNetwork.full(result.model)
    counted = macs(result.model, 1, 12).of(full)
    with torch.no_grad():
        before = result.model(**batch).logits
        dial.selection = replace(
            usual, chooser=lambda layer, score, layout: torch.rand(score.shape, generator=generator)
        )
        assert macs(result.model, 1, 12).of(full) == counted
        assert not torch.allclose(result.model(**batch).logits, before)
        dial.selection = usual
        assert torch.equal(result.model(**batch).logits, before)


def test_a_budget_beyond_train_speedup_is_trained_for(tmp_path: Path) -> None:
    result = compress(
        tiny_model("bert"),
        secateur.Late(**{**LATE, "train_speedup": 1.2}),
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget="speedup>=2",
    )
    assert result.after.macs <= result.before.macs / 2


@pytest.mark.parametrize("wanted", ["50%", "8ms,macs<=1"])
def test_latency_budgets_are_times(made: tuple[Path, secateur.Result], wanted: str) -> None:
    with pytest.raises(InvalidBudget, match="A latency budget is a time, such as '8ms'"):
        dial_of(made[1].model).latency_budget = wanted


def test_a_model_with_a_turned_dial_is_sliced(made: tuple[Path, secateur.Result]) -> None:
    """Heads and neurons are judged with the dial at 1, which stays where it was on the model as given."""
    model = made[1].model
    before = dial_of(model).alpha
    setting = secateur.Optin(batches=1, batch_size=8, probes=2, tune_batches=1, multiple=8)
    result = compress(model, setting, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="macs<=70%")
    assert dial_of(model).alpha == before > 0
    assert [edit["type"] for edit in result.edits] == ["drop_tokens", "slice"]
    assert result.after.macs <= 0.7 * result.before.macs
    assert dial_of(result.model).alpha == 0
    dial_of(result.model).speedup = 1.5
    assert dial_of(result.model).speedup >= 1.5


def test_a_new_head_keeps_the_dial(made: tuple[Path, secateur.Result], tmp_path: Path) -> None:
    body = AutoModel.from_pretrained(made[0])
    folder = secateur.finetune(
        body, tiny_tokenizer(), tiny_task(), tmp_path / "again", epochs=1, batch_size=16, max_length=32
    )
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert dial_of(again).alpha == dial_of(made[1].model).alpha


PARALLEL = """
import sys
from pathlib import Path
import torch; torch.set_num_threads(1)
import torch.distributed as dist
from safetensors.torch import save_file
from secateur.edits import DropTokens
from secateur.edits.tokens import dial_of
from secateur.methods.late import Turning
from secateur.train.loop import Settings, fit
from secateur.train.losses import distilled
from tests.conftest import tiny_model
from tests.contract.test_methods import tiny_task, tiny_tokenizer

model = tiny_model("bert")
DropTokens(profile=(0.8, 0.55, 0.3), tokens=12).apply(model)
dial = dial_of(model)
turning = Turning(dial, dial.alpha_for(2.0), 0.3, True, 0)
settings = Settings(2, 1e-3, 8, 32, 0.1, 0.01, 0, None, False)
objective = distilled(tiny_model("bert"), 0.5)
rows = []
model.register_forward_pre_hook(lambda m, args, given: rows.append(given["input_ids"].sum().item()), with_kwargs=True)
folder = Path(sys.argv[1]) / "run"
fit(model, tiny_tokenizer(), tiny_task(80), folder, settings, objective=objective, callbacks=[turning])
assert dist.get_world_size() == 2
rank = dist.get_rank()
seen = torch.tensor(rows, dtype=torch.long)
save_file({**model.state_dict(), "seen": seen, "alpha": torch.tensor(dial.alpha)}, f"{sys.argv[1]}/{rank}.safetensors")
"""


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Data parallel over gloo: each process sees its own half of the rows, the dial turns alike, the weights agree."""
    in_processes(2, PARALLEL, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert len(first["seen"]) == len(second["seen"]) == 8  # 64 rows, 8 at a time, in two processes, twice
    assert not torch.equal(first.pop("seen"), second.pop("seen"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], tiny_model("bert").state_dict()["classifier.weight"])
