"""Contract of every method: budget met, masked equals sliced, round trip, resume after a kill, labels left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import secateur
from secateur.costs import analytic
from secateur.errors import InvalidBudget, InvalidData, InvalidModel, SecateurError
from secateur.methods import Baseline, Optin, Ptf, method_of
from secateur.subnetwork import SubNetwork
from tests.conftest import ENCODERS, tiny_model

compress = partial(secateur.compress, seconds=0.05)
WORDS = [f"w{i}" for i in range(94)]
SETTINGS: dict[str, Any] = {
    "random": Baseline("random", multiple=8),
    "magnitude": Baseline("magnitude", multiple=8),
    "local": Baseline("local", batches=2, batch_size=8, multiple=8),
    "optin": Optin(batches=2, batch_size=8, probes=4, rearrange=False, tune="none", multiple=8),
    "optin exact": Optin(scorer="exact", batches=1, tune_batches=1, batch_size=8, tokens=64, multiple=8),
    "optin refined": Optin(batches=1, batch_size=8, probes=4, refine=0.2, tune="scale", tune_batches=1, multiple=8),
    "optin repaired": Optin(batches=2, batch_size=8, probes=4, tune_batches=2, multiple=8),
    "ptf": Ptf(batches=4, batch_size=8, multiple=8),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 … w93 as ids 5 … 98, with special tokens 0 … 4."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_task(rows: int = 60, seed: int = 0) -> secateur.Task:
    """Random sentences; the label says whether the first word is in the upper half."""
    generator = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for _ in range(rows):
        ids = torch.randint(
            0, 94, (int(torch.randint(4, 12, (1,), generator=generator)),), generator=generator
        ).tolist()
        texts.append(" ".join(WORDS[i] for i in ids))
        labels.append(int(ids[0] >= 47))
    return secateur.load_task(Dataset.from_dict({"text": texts, "label": labels}))


@pytest.mark.parametrize("setting", SETTINGS)
def test_method_meets_its_budget_and_round_trips(setting: str, tmp_path: Path) -> None:
    model = tiny_model("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(
        model,
        SETTINGS[setting],
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget="macs<=60%,params<=95%",
        out=tmp_path / "out",
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.after.params <= 0.95 * result.before.params
    assert result.after.params == sum(p.numel() for p in result.model.parameters())
    assert result.after.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result.predicted["macs"] == result.after.macs
    point, low, high = result.task["difference"]
    metric = result.task["metric"]
    assert point == pytest.approx(result.after.metrics[metric] - result.before.metrics[metric])
    assert low <= point <= high
    assert analytic.macs(model, 1, result.latency_setting["tokens"]).of(
        SubNetwork.from_dict(result.subnetwork)
    ) == pytest.approx(result.after.macs)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = {"input_ids": torch.randint(5, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, result.model(**batch).logits)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record == json.loads(json.dumps(result.to_dict()))
    assert {"README.md", "report.html", "config.json", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert not (tmp_path / "out.run").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| parameters | {result.before.params / 1e6:.2f} M | {result.after.params / 1e6:.2f} M |" in card
    assert "macs<=60%,params<=95%" in card


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("setting", ["optin repaired", "ptf"])
def test_every_encoder_is_pruned(setting: str, encoder: str) -> None:
    model = tiny_model(encoder)
    result = compress(
        model, SETTINGS[setting], task=tiny_task(), tokenizer=tiny_tokenizer(), budget="encoder_params<=50%"
    )
    assert result.after.encoder_params <= 0.5 * result.before.encoder_params
    assert all(abs(value) <= 1 for value in result.after.metrics.values())


def test_same_seed_same_model_other_seed_other_model() -> None:
    def masks(seed: int) -> dict[str, Any]:
        return compress(
            tiny_model("bert"), SETTINGS["random"], task=tiny_task(), tokenizer=tiny_tokenizer(), seed=seed
        ).subnetwork

    assert masks(1) == masks(1)
    assert masks(1) != masks(2)


def test_optin_never_reads_labels() -> None:
    def masks(flip: int) -> dict[str, Any]:
        task = tiny_task()
        train = task.train.map(lambda row: {"label": row["label"] ^ flip})  # type: ignore[union-attr]
        from dataclasses import replace

        return compress(
            tiny_model("bert"), SETTINGS["optin repaired"], task=replace(task, train=train), tokenizer=tiny_tokenizer()
        ).subnetwork

    assert masks(0) == masks(1)


def test_regression_is_pruned_without_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {
        "text": [" ".join(WORDS[i : i + 6]) for i in range(60)],
        "score": torch.rand(60, generator=generator).tolist(),
    }
    task = secateur.load_task(Dataset.from_dict(rows))
    result = compress(
        tiny_model("bert", num_labels=1), SETTINGS["optin repaired"], task=task, tokenizer=tiny_tokenizer()
    )
    assert result.task["metric"] == "spearman"
    assert result.after.macs <= 0.6 * result.before.macs


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("macs<=1%", "nearest feasible budget is macs<="),
        ("latency<=0ms", "latency"),
        ("macs<=abc", "abc"),
        ("speedup>=3", "speedup"),
        ("", "budget"),
        ("macs<=100%", "100%"),
    ],
)
def test_bad_budgets(budget: str, message: str) -> None:
    with pytest.raises(InvalidBudget, match=message) as error:
        compress(tiny_model("bert"), task=tiny_task(), tokenizer=tiny_tokenizer(), budget=budget)
    assert "\n" not in str(error.value)


def test_bad_methods_and_models() -> None:
    with pytest.raises(SecateurError, match="choose from"):
        compress(tiny_model("bert"), "optim", task=tiny_task(), tokenizer=tiny_tokenizer())
    with pytest.raises(InvalidData, match="3 labels|3"):
        compress(tiny_model("bert", num_labels=3), task=tiny_task(), tokenizer=tiny_tokenizer())
    broken = tiny_model("bert")
    with torch.no_grad():
        broken.classifier.weight.fill_(float("nan"))
    with pytest.raises(InvalidModel, match="NaN"):
        compress(broken, task=tiny_task(), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("optin", {"scorer": "probes"}, "scorer is probe or exact, not 'probes'"),
        ("optin", {"probes": 0}, "probes is a whole number from 1, not 0"),
        ("optin", {"lambda_c": -1.0}, "lambda_c is a number from 0, not -1.0"),
        ("optin", {"tune": "ful"}, "tune is none or scale or full or true or false, not 'ful'"),
        ("optin", {"refine": 1.5}, "refine"),
        ("ptf", {"batches": "many"}, "batches is a whole number from 1, not 'many'"),
        ("baseline", {"score": "luck"}, "score is random or magnitude or local, not 'luck'"),
    ],
)
def test_bad_settings_are_refused_at_once(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        method_of(method, **settings)


def test_half_precision_slices_are_cut_again() -> None:
    once = compress(tiny_model("bert"), SETTINGS["optin repaired"], task=tiny_task(), tokenizer=tiny_tokenizer())
    model = once.model.to(torch.bfloat16)
    setting = Optin(scorer="exact", batches=1, batch_size=8, tokens=64, tune_batches=1, multiple=8)
    twice = compress(model, setting, task=tiny_task(), tokenizer=tiny_tokenizer(), budget="macs<=80%")
    assert twice.model.dtype == torch.bfloat16
    assert len(twice.edits) == 1
    assert twice.after.macs <= 0.8 * twice.before.macs


KILLED = """
import sys, torch
torch.set_num_threads(1)
import secateur
from tests.contract.test_methods import SETTINGS, tiny_task
secateur.compress(sys.argv[1], SETTINGS["optin repaired"], task=tiny_task(), out=sys.argv[2], resume=sys.argv[3] == "1")
"""


def _compress(model: Path, out: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(model), str(out), str(int(resume))],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def test_killed_run_resumes_to_the_same_model(tmp_path: Path) -> None:
    """SIGKILL as soon as a stage is on disk, twice; the end is the same, bit by bit."""
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert _compress(tmp_path / "dense", tmp_path / "whole").wait(300) == 0
    for attempt, stage in enumerate(("score.seconds", "tune.seconds")):
        run = _compress(tmp_path / "dense", tmp_path / "out", resume=attempt > 0)
        deadline = time.monotonic() + 300
        while not (tmp_path / "out.run" / stage).exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.wait()
    if not (tmp_path / "out").exists():
        last = _compress(tmp_path / "dense", tmp_path / "out", resume=True)
        assert last.wait(300) == 0, last.stderr.read()  # type: ignore[union-attr]
    # tensors, not bytes: safetensors writes its metadata in another order each time
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "out")]
    for key in ("subnetwork", "scores", "edits", "budget", "predicted"):
        assert results[0][key] == results[1][key]
    assert results[0]["after"]["metrics"] == results[1]["after"]["metrics"]
    assert not (tmp_path / "out.run").exists()


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    from secateur.run import Run

    Run(tmp_path / "run", {"budget": "macs<=60%", "seed": 0})
    with pytest.raises(SecateurError, match="another budget"):
        Run(tmp_path / "run", {"budget": "macs<=50%", "seed": 0}, resume=True)
    with pytest.raises(SecateurError, match="no unfinished run"):
        Run(tmp_path / "absent", {}, resume=True)
    Run(tmp_path / "run", {"budget": "macs<=60%", "seed": 0}, resume=True).close()
    assert not (tmp_path / "run").exists()
