"""Export: the files compute what the model computes, at shapes the conversion never saw, or nothing is written."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur import hub
from secateur.edits import DropTokens, Slice, apply_edits
from secateur.errors import InvalidModel, MissingExtra, SecateurError, UnsupportedModel
from secateur.exporting import CHECK_FILE, compare, example_inputs, export, input_names, longest_input
from secateur.families import sites
from secateur.subnetwork import SubNetwork
from tests.conftest import tiny_batch, tiny_model
from tests.unit import tiny_text

module = importlib.import_module("secateur.exporting")


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in module.FORMATS[name].packages)


def uneven(model: nn.Module) -> nn.Module:
    """Layers of different widths, the second without heads, the last without neurons."""
    found = sites(model)
    heads = [torch.arange(site.units) != i for i, site in enumerate(found.heads)]
    neurons = [torch.arange(site.units) % (i + 2) > 0 for i, site in enumerate(found.neurons)]
    heads[1][:] = False
    neurons[-1][:] = False
    edits = [Slice(SubNetwork.from_masks(heads, neurons))]
    hub.attach(apply_edits(model, edits), edits)
    return model


def test_inputs_follow_tokenizer_config_and_forward() -> None:
    assert input_names(tiny_model("bert")) == ("input_ids", "attention_mask", "token_type_ids")
    assert input_names(tiny_model("roberta", type_vocab_size=1)) == ("input_ids", "attention_mask")
    assert input_names(tiny_model("distilbert"), tiny_text.tokenizer()) == ("input_ids", "attention_mask")
    assert input_names(tiny_model("vit")) == ("pixel_values",)


def test_example_rows_are_padded_with_the_pad_id_only() -> None:
    model = tiny_model("roberta", pad_token_id=1)
    inputs = example_inputs(model, ("input_ids", "attention_mask"), batch=3, tokens=9)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [9, 6, 4]
    assert torch.equal(inputs["input_ids"] == 1, inputs["attention_mask"] == 0)
    assert inputs["input_ids"].max() < 99


def test_example_images_have_the_size_of_the_config() -> None:
    assert example_inputs(tiny_model("vit"), ("pixel_values",), 2, 0)["pixel_values"].shape == (2, 3, 32, 32)


def test_inputs_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="bbox"):
        example_inputs(tiny_model("bert"), ("input_ids", "bbox"), 2, 4)


def test_longest_input_leaves_room_for_offset_positions() -> None:
    assert longest_input(tiny_model("bert")) == 63
    assert longest_input(tiny_model("roberta", pad_token_id=1)) == 62
    assert longest_input(tiny_model("roberta", max_position_embeddings=4000)) == 512


def runner(model: nn.Module, error: float) -> Any:
    def run(inputs: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"logits": model(**inputs).logits + error}

    return run


def test_compare_measures_the_largest_difference() -> None:
    model = tiny_model("bert")
    found = compare(model, runner(model, 5e-5), input_names(model), 1e-4)
    assert found["max_abs_difference"] == pytest.approx(5e-5, rel=0.02)
    assert found["outputs"] == ["logits"]
    assert [(c["batch"], c["tokens"]) for c in found["checks"]] == [(1, 1), (1, 7), (3, 33), (5, 16), (2, 63)]


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_compare_refuses_what_differs(error: float) -> None:
    model = tiny_model("bert")
    with pytest.raises(SecateurError, match="differs from the model"):
        compare(model, runner(model, error), input_names(model), 1e-4)


def test_compare_refuses_other_shapes_and_unknown_outputs() -> None:
    model = tiny_model("bert")
    for wrong in ({"logits": torch.zeros(1, 3)}, {"scores": torch.zeros(1, 2)}):
        with pytest.raises(SecateurError, match="differs"):
            compare(model, lambda inputs, wrong=wrong: wrong, input_names(model), 1e-4)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for name in ("onnx", "openvino"):
        with pytest.raises(MissingExtra, match=rf"pip install secateur\[{name}\]"):
            export(tiny_model("bert"), tmp_path / "out", name)


def test_mistakes_are_named_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    model = tiny_model("bert")
    with pytest.raises(SecateurError, match="Unknown export format 'tflite': use onnx or openvino"):
        export(model, tmp_path / "out", "tflite")
    with pytest.raises(SecateurError, match="pass out="):
        export(model)
    with pytest.raises(InvalidModel, match="float32, not bfloat16"):
        export(tiny_model("bert").bfloat16(), tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="encoder"):
        export(tiny_model("t5"), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(SecateurError, match="not an earlier export"):
        export(model, tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_a_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: Any) -> None:
        raise SecateurError("the converter broke")

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(module, "_convert", broken)
    model = tiny_model("bert").train()
    with pytest.raises(SecateurError, match="broke"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert all(part.training for part in model.modules())


@pytest.fixture(scope="module")
def sliced_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sliced"
    uneven(tiny_model("bert", num_hidden_layers=2)).save_pretrained(folder)
    tiny_text.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(not installed("onnx"), reason="needs secateur[onnx]")
def test_onnx_of_a_sliced_folder(sliced_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    out = export(sliced_folder)
    assert capfd.readouterr().out == ""
    assert out == sliced_folder / "onnx"
    record = json.loads((out / CHECK_FILE).read_text())
    assert record["max_abs_difference"] <= 1e-5
    assert record["outputs"] == ["logits"]
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert (out / "tokenizer.json").is_file()

    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {port.name for port in session.get_inputs()} == set(tiny_text.tokenizer().model_input_names)
    inputs = tiny_batch("bert", batch=4, length=21)
    expected = hub.open_any(sliced_folder)(**inputs).logits
    found = torch.from_numpy(session.run(["logits"], {k: v.numpy() for k, v in inputs.items()})[0])
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.skipif(not installed("openvino"), reason="needs secateur[openvino]")
def test_openvino_of_a_live_model_replaces_an_earlier_export(tmp_path: Path) -> None:
    import openvino

    model = uneven(tiny_model("bert", num_hidden_layers=2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CHECK_FILE).write_text("{}")
    (tmp_path / "out" / "stale.bin").write_text("old")
    out = export(model, tmp_path / "out", "openvino")
    assert not (out / "stale.bin").exists()
    assert "forward" not in vars(model)
    assert json.loads((out / CHECK_FILE).read_text())["max_abs_difference"] <= 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    compiled = openvino.Core().compile_model(
        str(out / "openvino_model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    inputs = tiny_batch("bert", batch=4, length=21)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    found = torch.from_numpy(compiled({k: v.numpy() for k, v in inputs.items()})["logits"])
    assert (found - model(**inputs).logits).abs().max() <= 1e-5


@pytest.mark.skipif(not installed("onnx"), reason="needs the onnx extra")
def test_a_turned_dial_is_in_the_graph(tmp_path: Path) -> None:
    """One file for every batch and length, with the tokens dropped that the model drops."""
    import onnxruntime

    model: Any = tiny_model("bert")
    DropTokens(profile=(0.8, 0.5, 0.3), tokens=16, alpha=1.0).apply(model)
    out = export(model, tmp_path / "onnx", speedup=1.5)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = tiny_batch("bert", batch=4, length=21)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        model.secateur.speedup = 1.5
        assert (torch.from_numpy(found) - model(**inputs).logits).abs().max() <= 1e-5
        model.secateur.speedup = 1
        assert (torch.from_numpy(found) - model(**inputs).logits).abs().max() > 1e-3
    assert json.loads((out / CHECK_FILE).read_text())["max_abs_difference"] <= 1e-4


@pytest.mark.parametrize(("family", "format"), [("bert", "openvino"), ("gpt2", "onnx")])
def test_a_turned_dial_that_cannot_be_exported(family: str, format: str, tmp_path: Path) -> None:
    if not installed(format):
        pytest.skip(f"needs secateur[{format}]")
    model = tiny_model(family)
    DropTokens(profile=(0.8, 0.5, 0.3), tokens=16, alpha=1.0, recent=1).apply(model)
    with pytest.raises(SecateurError, match=r"dial stands at a speed-up of 1\.\d+; .* use speedup=1"):
        export(model, tmp_path / "out", format)
