"""Contract of the loader: a damaged folder is refused in one line or runs; `make fuzz` tries many more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import InvalidModel
from secateur.runtime import load
from tests.fuzz_loader import fuzz, make_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("fuzz")
    make_folders(where)
    return where


def test_damaged_folders(folders: Path) -> None:
    counts, findings = fuzz(folders, range(50))
    assert findings == []
    assert sum(counts.values()) == 50
    assert counts["ran"] > 0
    assert counts["refused"] > 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 2**63, "says 9223372036854775808 layers"),
        ("hidden_size", None, "'hidden_size': TypeError: Field 'hidden_size' expected int, got NoneType"),
        ("architectures", 1, "'int' object is not iterable"),
        ("architectures", [65], "attribute name must be string"),
        ("dtype", [], "list index out of range"),
    ],
)
def test_what_a_config_may_not_say(folders: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    shutil.copytree(folders / "dense", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(InvalidModel, match="cannot be opened: .*" + message):
        load(tmp_path / "model")


def test_negative_heads(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "dense", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": -1}))
    with pytest.raises(InvalidModel, match="heads of -?[0-9]+ entries: the config is damaged"):
        load(tmp_path / "model")


def test_layers_without_weights_are_not_drawn_at_random(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "dense", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps(given | {"num_hidden_layers": given["num_hidden_layers"] + 1}))
    with pytest.raises(InvalidModel, match="has no weights for bert.encoder.layer"):
        load(tmp_path / "model")
