"""Contract of saving: every family × slice reopens bit-exact, trains, and is refused without the package."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import secateur.hub as hub
from secateur.edits import Slice, apply_edits
from secateur.errors import InvalidModel, SecateurError
from secateur.families import sites
from secateur.subnetwork import SubNetwork
from tests.conftest import TINY, tiny_batch, tiny_model
from tests.contract.test_families import CUTS, cut, logits


def auto_class(family: str):  # type: ignore[no-untyped-def]
    return getattr(transformers, f"AutoModelFor{TINY[family][1]}")


def sliced(family: str, how: str = "layer without both") -> torch.nn.Module:
    model = tiny_model(family)
    edits = [Slice(cut(model, how))]
    apply_edits(model, edits)
    hub.attach(model, edits)
    return model


@pytest.mark.parametrize("how", CUTS)
def test_round_trip_is_bit_exact(family: str, how: str, tmp_path: Path) -> None:
    model, batch = sliced(family, how), tiny_batch(family)
    model.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert hub.edits_of(again) == hub.edits_of(model)
    half = auto_class(family).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert [s.units for s in sites(half)] == [s.units for s in sites(model)]


def test_reopened_model_trains_and_slices_again(family: str, tmp_path: Path) -> None:
    model, batch = sliced(family), tiny_batch(family)
    model.save_pretrained(tmp_path / "once")
    model = auto_class(family).from_pretrained(tmp_path / "once")
    classifies = TINY[family][1].endswith("Classification")
    labels = torch.tensor([0, 1, 0]) if classifies else batch.get("decoder_input_ids", batch.get("input_ids"))
    rows = [{key: value[i] for key, value in {**batch, "labels": labels}.items()} for i in range(3)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run",
        max_steps=2,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    assert trainer.train().training_loss > 0
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("layer" in name or "block" in name or ".h." in name for name in changed)
    trainer.save_model(str(tmp_path / "trained"))
    second = Slice(cut(model, "random", seed=5))
    apply_edits(model, [second])
    hub.attach(model, [second])
    assert len(hub.edits_of(model)) == 1
    model.eval().save_pretrained(tmp_path / "twice")
    again = auto_class(family).from_pretrained(tmp_path / "twice")
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert auto_class(family).from_pretrained(tmp_path / "trained").training is False


def test_without_the_package_the_folder_is_refused(tmp_path: Path) -> None:
    model = sliced("bert")
    model.save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "size" in run.stderr.lower()
    run = subprocess.run(
        [sys.executable, "-c", "import secateur; " + code], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"colour": "red"}, r"unknown keys \['colour'\]"),
        ({"edits": [{"type": "prune"}]}, "unknown edit 'prune'"),
        ({"edits": "slice"}, "must be a list"),
        ({"edits": [{"type": "slice", "heads": []}]}, "keys 'heads' and 'neurons'"),
        ({"edits": [{"type": "slice", "heads": ["4:g"], "neurons": []}]}, "not hexadecimal"),
        ({"edits": [{"type": "slice", "heads": ["4:f"], "neurons": []}]}, "not those model.safetensors was saved with"),
        ({"edits": []}, "not those model.safetensors was saved with"),
    ],
)
def test_tampered_configs_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    sliced("bert").save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InvalidModel, match=message):
        hub.open_model(tmp_path)


def test_swapped_heads_of_equal_number_are_noticed(tmp_path: Path) -> None:
    model = sliced("mpnet", "random")
    model.save_pretrained(tmp_path)
    edits = [edit.to_dict() for edit in hub.edits_of(model)]
    units, digits = edits[0]["heads"][0].split(":")
    edits[0]["heads"][0] = f"{units}:{int(f'{int(digits, 16):04b}'[::-1], 2):x}"
    edit_config(tmp_path, edits=edits)
    with pytest.raises(InvalidModel, match="not those"):
        hub.open_model(tmp_path)


def test_bad_folders_get_one_line(tmp_path: Path) -> None:
    model = sliced("bert")
    with pytest.raises(InvalidModel, match="no config.json"):
        hub.open_model(tmp_path)
    with pytest.raises(InvalidModel, match="There is no folder"):
        hub.open_model(tmp_path / "absent")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidModel, match="damaged|cannot be opened") as error:
        hub.open_model(tmp_path)
    assert "\n" not in str(error.value)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InvalidModel, match="pickled weights"):
        hub.open_model(tmp_path)


def test_failed_save_keeps_the_old_folder(tmp_path: Path) -> None:
    model = sliced("bert")
    folder = hub.save_model(tmp_path / "out", model, None)  # type: ignore[arg-type]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def disk_full(fresh: Path) -> None:
        (fresh / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with pytest.raises(SecateurError, match="No space left on device.*untouched"):
        hub.save_folder(folder, disk_full)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_interrupted_save_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = hub.save_model(tmp_path / "out", sliced("bert"), None)  # type: ignore[arg-type]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def interrupted(fresh: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.save_folder(folder, interrupted)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    folder.rename(tmp_path / ".out.old")  # as a kill between the two renames leaves it
    with pytest.raises(SecateurError, match="untouched"):
        hub.save_folder(folder, lambda fresh: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    hub.check_target(mine, "result.json")
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(SecateurError, match="something else"):
        hub.check_target(mine, "result.json")
    with pytest.raises(SecateurError, match="is a file"):
        hub.check_target(mine / "thesis.tex", "result.json")
    (mine / "result.json").write_text("{}")
    hub.check_target(mine, "result.json")
    with pytest.raises(SecateurError, match="the model itself"):
        hub.check_target(mine, "result.json", str(mine))


def test_a_model_that_was_never_fine_tuned_is_refused(tmp_path: Path) -> None:
    tiny_model("bert").base_model.save_pretrained(tmp_path)
    with pytest.raises(InvalidModel, match=r"no weights for classifier\.bias.*finetune"):
        hub.open_model(tmp_path, trained=True)
    assert hub.open_model(tmp_path).config.num_labels == 2


def test_weights_are_physically_smaller(tmp_path: Path) -> None:
    dense, model = tiny_model("bert"), sliced("bert")
    dense.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "sliced")
    with safe_open(tmp_path / "sliced" / "model.safetensors", framework="pt") as weights:
        kept = SubNetwork.from_dict({k: v for k, v in hub.edits_of(model)[0].to_dict().items() if k != "type"})
        shape = weights.get_slice("bert.encoder.layer.1.intermediate.dense.weight").get_shape()
        assert shape == [kept.neuron_widths[1], 32]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "sliced")]
    assert sizes[1] < sizes[0]


def test_deep_copies_are_independent(family: str) -> None:
    model, batch = sliced(family), tiny_batch(family)
    twin = copy.deepcopy(model)
    expected = logits(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, batch), expected)


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_full_disk_keeps_the_old_folder(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts")
    try:
        model = sliced("bert")
        folder = hub.save_model(disk / "out", model, None)  # type: ignore[arg-type]
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        big = tiny_model("bert", hidden_size=256)
        with pytest.raises(SecateurError, match="untouched"):
            hub.save_model(folder, big, None)  # type: ignore[arg-type]
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)
