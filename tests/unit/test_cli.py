"""The command line: one-line errors with the fix, exit codes, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import secateur
from secateur.cli import app, main
from tests.unit import tiny_text

runner = CliRunner()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    tiny_text.model().save_pretrained(tmp_path / "model")
    tiny_text.tokenizer().save_pretrained(tmp_path / "model")
    texts, labels = tiny_text.sentences(60)
    rows = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "three.csv").write_text("text,label\n" + "\n".join([*rows, "the film,ugly"] * 3) + "\n")
    return tmp_path


def one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run `main` and return its message, after checking exit code 2 and that it is one line."""
    monkeypatch.setattr("sys.argv", ["secateur", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert message.startswith("secateur: ")
    return message


@pytest.mark.parametrize("given", [["--text", "second,first"], ["--text", "second", "--text", "first"]])
def test_two_text_columns(
    given: list[str], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are read: a second one that is not there is named."""
    (work / "pairs.csv").write_text("first,third,label\n" + "the film,is good,good\n" * 20)
    assert "second" in one_line(capsys, monkeypatch, "evaluate", "model", "-t", "pairs.csv", *given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "absent/folder/x", "-t", "data.csv"], "no folder"),
        (["compress", "data.csv", "-t", "data.csv"], "is a file"),
        (["compress", "model", "-t", "absent.csv"], "absent.csv"),
        (["compress", "model", "-t", "empty.csv"], "empty.csv"),
        (["compress", "model", "-t", "wrong.csv"], "--text|--label"),
        (["compress", "model", "-t", "three.csv"], "3 labels"),
        (["compress", "model", "-t", "data.csv", "-b", "macs<=1%"], "nearest feasible"),
        (["compress", "model", "-t", "data.csv", "-b", "latency<=0ms"], "latency"),
        (["compress", "model", "-t", "data.csv", "-b", "macs<=abc"], "abc"),
        (["compress", "model", "-t", "data.csv", "-m", "magic"], "Unknown method"),
        (["compress", "model", "-t", "data.csv", "-s", "lambda=1"], "has no setting lambda"),
        (["compress", "model", "-t", "data.csv", "-s", "lambda"], "key=value"),
        (["compress", "model", "-t", "data.csv", "-s", "tune=always"], "tune is none or scale or full"),
        (["compress", "model", "-t", "data.csv", "--split", "dev"], "dev"),
        (["compress", "model", "-t", "data.csv", "--resume"], "no unfinished run"),
        (["evaluate", "model", "-t", "data.csv", "--metric", "bleu"], "bleu"),
        (["measure", "model", "--tokens", "8", "--kernels"], "prune it first"),
        (["compress", "model", "-t", "data.csv", "-m", "mgpp", "-s", "pattern=rows"], "A pattern is '1x1'"),
        (
            ["compress", "model", "-t", "data.csv", "-m", "mgpp", "-s", "pattern=units", "-s", "values=int8"],
            "leave it out",
        ),
        (["report", "model"], "no result"),
        (["export", "model", "-f", "tflite"], "tflite"),
        (["measure", "model", "--tokens", "100"], "64"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str],
    message: str,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    assert re.search(message, one_line(capsys, monkeypatch, *arguments))
    assert not (work / "out").exists()


def test_measure_with_sparse_kernels(work: Path) -> None:
    model = tiny_text.model()
    for layer in model.bert.encoder.layer:
        layer.output.dense.weight.data[:, 2:] = 0
    secateur.sparsify(model).save_pretrained(work / "sparse")
    arguments = ["measure", "sparse", "--tokens", "8", "--seconds", "0.1", "--kernels"]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0
    assert "2 maps of 16 x 24, 92% zeros, rows: " in shown.stdout
    assert "kernels (latency_ms (median " in shown.stdout
    found = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)["kernels"]
    assert found["choices"][0]["shape"] == [16, 24]
    assert found["ratio"] > 0


def test_unseen_class_nan_and_pickle(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "folder").mkdir()
    (work / "folder" / "train.csv").write_text("text,label\nthe film is good,good\nthe film is bad,bad\n" * 9)
    (work / "folder" / "validation.csv").write_text("text,label\nthe film is ugly,ugly\n")
    assert "ugly" in one_line(capsys, monkeypatch, "compress", "model", "-t", "folder")
    broken = tiny_text.model()
    with torch.no_grad():
        broken.classifier.bias.fill_(float("nan"))
    broken.save_pretrained(work / "broken")
    tiny_text.tokenizer().save_pretrained(work / "broken")
    assert "NaN" in one_line(capsys, monkeypatch, "compress", "broken", "-t", "data.csv")
    (work / "model" / "model.safetensors").rename(work / "model" / "pytorch_model.bin")
    assert "pickled" in one_line(capsys, monkeypatch, "compress", "model", "-t", "data.csv")


def test_unknown_architecture(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import FunnelConfig, FunnelForSequenceClassification

    config = FunnelConfig(vocab_size=20, d_model=16, n_head=2, d_head=8, d_inner=24, block_sizes=[1, 1], num_labels=2)
    FunnelForSequenceClassification(config).save_pretrained(work / "funnel")
    tiny_text.tokenizer().save_pretrained(work / "funnel")
    message = one_line(capsys, monkeypatch, "compress", "funnel", "-t", "data.csv")
    assert "'funnel' is not in secateur's table (nearest: " in message


def test_list_measure_and_evaluate_print_json(work: Path) -> None:
    found = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert set(found["methods"]) == {"optin", "ptf", "late", "mgpp", "bit", "nas", "baseline"}
    assert "sst2" in found["tasks"]
    measured = json.loads(
        runner.invoke(app, ["measure", "model", "--tokens", "8", "--seconds", "0.1", "--json"]).stdout
    )
    assert measured["params"] == sum(p.numel() for p in tiny_text.model().parameters())
    assert measured["latency_ms"]["median"] > 0
    judged = json.loads(runner.invoke(app, ["evaluate", "model", "-t", "data.csv", "--json"]).stdout)
    assert 0 <= judged["metrics"]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("settings", "starts", "message"),
    [
        (["pattern=4x2"], True, "weights of the layers' maps that are not zero"),
        (["pattern=5x5"], False, "cannot be divided into 5x5"),
        (["weights=nothinghere"], False, "matches no weight"),
        (["pattern=2:4"], False, "nearest feasible budget is sparsity>=0.5"),
        (["floor=0.5"], False, "nearest feasible budget is sparsity>=0.5"),
        (["before=0.6", "after=0.6"], False, "together they are below 1"),
        (["lr=0"], False, "lr is above 0"),
        (["spike=1"], False, "0 < spike <= slab"),
    ],
)
def test_a_dry_run_says_what_a_run_would(settings: list[str], starts: bool, message: str, work: Path) -> None:
    pairs = [part for setting in settings for part in ("-s", setting)]
    budget = ["-b", "sparsity>=90%", "--dry-run"]
    result = runner.invoke(app, ["compress", "model", "-t", "data.csv", "-m", "mgpp", *budget, *pairs])
    assert (result.exit_code == 0) == starts
    assert message in (result.stdout if starts else str(result.exception))
    if starts:
        assert "steps" in result.stdout
        assert "choices" in result.stdout


def test_dry_run_writes_nothing(work: Path) -> None:
    result = runner.invoke(app, ["compress", "model", "-t", "data.csv", "-b", "macs<=70%", "--dry-run", "--json"])
    found = json.loads(result.stdout)
    assert found["limits"][0]["predicted"] <= found["limits"][0]["limit"]
    assert found["limits"][0]["limit"] == pytest.approx(0.7 * found["limits"][0]["before"])
    assert not (work / "out").exists()
    assert not (work / "out.run").exists()
