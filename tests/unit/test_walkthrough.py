"""The commands of the walkthrough and the README's example run as they stand on the page."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from tests.unit import tiny_text

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with my-model and reviews.csv, as the walkthrough assumes."""
    model = tiny_text.model(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model.save_pretrained(tmp_path / "my-model")
    tiny_text.tokenizer().save_pretrained(tmp_path / "my-model")
    texts, labels = tiny_text.sentences(80)
    lines = ["text,label", *(f'"{text}",{label}' for text, label in zip(texts, labels, strict=True))]
    (tmp_path / "reviews.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)


def test_walkthrough_runs(folder: Path) -> None:
    commands = [line for block in blocks("docs/walkthrough.md", "bash") for line in block.splitlines() if line]
    assert len(commands) >= 9
    script = blocks("docs/walkthrough.md", "python")[0]
    for command in commands:
        arguments = shlex.split(command)
        assert arguments[0] == "secateur"
        if arguments[1] == "finetune":
            exec(compile(script, "walkthrough", "exec"), {})
        result = CliRunner().invoke(app, [*arguments[1:], "--json"])
        assert result.exit_code == 0, f"{command}: {result.output} {result.exception}"
        json.loads(result.stdout.splitlines()[-1])
    assert (folder / "both.html").is_file()
    assert (folder / "smaller" / "onnx" / "model.onnx").is_file()


def test_readme_example_runs(folder: Path) -> None:
    script = blocks("README.md", "python")[0]
    assert len(script.splitlines()) <= 12
    script = script.replace("path-or-hub-id", "my-model").replace('"sst2"', '"reviews.csv"')
    exec(compile(script, "readme", "exec"), {})
    assert (Path(os.getcwd()) / "smaller" / "report.html").is_file()
