"""Contract of recipes: the examples run, a stopped run goes on with what is done, and mistakes are named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from secateur.cli import app
from secateur.composing import run_recipe
from secateur.errors import SecateurError
from secateur.recipes import Recipe
from tests.conftest import tiny_batch, tiny_model
from tests.contract.test_families import logits
from tests.contract.test_methods import tiny_task, tiny_tokenizer

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))
QUICK: dict[str, dict[str, Any]] = {
    "nas": {"epochs": 1, "batch_size": 8, "evaluations": 25, "batches": 1, "multiple": 8},
    "ptf": {"batches": 2, "batch_size": 8, "multiple": 8},
    "optin": {"batches": 2, "batch_size": 8, "probes": 4, "tune_batches": 1, "multiple": 8},
    "late": {"epochs": 1, "batch_size": 8, "train_speedup": 1.1},
    "mgpp": {"epochs": 2, "batch_size": 8},
    "bit": {"epochs": 1, "batch_size": 8, "batches": 1},
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A model and a folder of data beside it."""
    tiny_model("bert").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    for split, rows in tiny_task(60).splits().items():
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    return tmp_path / "dense"


def quick(path: Path, dense: Path) -> dict[str, Any]:
    """An example on a tiny model and its data, with as little training as there can be."""
    recipe = yaml.safe_load(path.read_text())
    recipe |= {"model": str(dense), "task": str(dense.with_name("data"))}
    for stage in recipe["stages"]:
        known = QUICK.get(stage.get("method") or stage.get("search"), {})
        if "finetune" not in stage:
            stage["set"] = {**stage.get("set", {}), **known}
        if stage.get("method") == "late":
            stage["budget"] = "speedup>=1.1"  # what so small a model can reach
    return recipe


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(path: Path, dense: Path, tmp_path: Path) -> None:
    recipe = quick(path, dense)
    result = run_recipe(recipe, tmp_path / "out", seconds=0.02)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = tiny_batch("bert")
    assert torch.equal(logits(again, batch), logits(result.model, batch))
    stages = sorted(file.name for file in (tmp_path / "out" / "stages").iterdir())
    names = [stage.get("method") or stage.get("search") or "finetune" for stage in recipe["stages"]]
    assert stages == [f"{number}-{name}" for number, name in enumerate(names, 1)]
    assert set(result.seconds) == set(stages)
    assert result.after.bytes < result.before.bytes
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["before"]["params"] == sum(p.numel() for p in tiny_model("bert").parameters())
    assert record["task"]["metric"] == "accuracy"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "recipe" in page
    assert not (tmp_path / "out.run").exists()


def test_a_stopped_run_goes_on(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second stage: the first is not done again, the result is that of a run that was never stopped."""
    recipe = quick(EXAMPLES[0], dense)
    recipe["stages"] = [{"method": "ptf", "budget": "macs<=80%", "set": QUICK["ptf"]}, {"finetune": {"epochs": 1}}]
    whole = run_recipe(recipe, tmp_path / "whole", seconds=0.02)

    def stop(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("secateur.composing.finetune", stop)
        run_recipe(recipe, tmp_path / "out", seconds=0.02)
    with pytest.raises(SecateurError, match="with another setting|with another data"):
        run_recipe({**recipe, "seed": 3}, tmp_path / "out", resume=True)
    monkeypatch.setattr("secateur.composing.compress", stop)
    resumed = run_recipe(recipe, tmp_path / "out", resume=True, seconds=0.02)
    batch = tiny_batch("bert")
    assert torch.equal(logits(resumed.model, batch), logits(whole.model, batch))


def test_a_corrected_recipe_keeps_what_is_the_same(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pick that no point meets is found after the search; another pick then goes on without a new search."""
    nas = {"search": "nas", "set": QUICK["nas"], "pick": "params<=1%"}
    recipe = quick(EXAMPLES[0], dense) | {"stages": [{"finetune": {"epochs": 1}}, nas, {"finetune": {"epochs": 1}}]}
    with pytest.raises(SecateurError, match=r"None of \d+ points is within params<=1%"):
        run_recipe(recipe, tmp_path / "out", seconds=0.02)
    recipe["stages"][1] = {**nas, "pick": "params<=70%"}

    def stop(*given: Any, **options: Any) -> Any:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("secateur.composing.search", stop)
        result = run_recipe(recipe, tmp_path / "out", resume=True, seconds=0.02)
    assert result.after.params <= 0.7 * result.before.params
    assert result.seconds["2-nas"] > 0.1  # of the first attempt
    page = (tmp_path / "out" / "stages" / "2-nas" / "report.html").read_text()
    assert f"secateur extract {tmp_path / 'out' / 'stages' / '2-nas'} --point" in page


def test_what_was_done_stays_when_the_rest_is_corrected(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows to judge by are checked first; other rows, or another number of threads, leave fine-tuning done."""
    ptf = {"method": "ptf", "budget": "params<=10%", "set": QUICK["ptf"]}  # out of reach
    recipe = quick(EXAMPLES[0], dense) | {"stages": [{"finetune": {"epochs": 1}}, ptf]}
    with pytest.raises(SecateurError, match="no 'tests' split"):
        run_recipe({**recipe, "split": "tests"}, tmp_path / "out")
    assert not (tmp_path / "out.run").exists()
    with pytest.raises(SecateurError, match="nearest feasible budget"):
        run_recipe(recipe, tmp_path / "out")
    recipe["stages"][1] = {**ptf, "budget": "params<=90%"}

    def stop(*given: Any, **options: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("secateur.composing.finetune", stop)  # is done, and stays so
    result = run_recipe({**recipe, "split": "test"}, tmp_path / "out", resume=True, seconds=0.02)
    assert result.task["split"] == "test"
    texts = [file.read_text() for file in (tmp_path / "out").rglob("*") if file.suffix in (".json", ".md", ".html")]
    assert not any("out.run" in text for text in texts)  # which is gone
    tiny_model("bert", num_hidden_layers=2).save_pretrained(dense)
    (tmp_path / "out.run").mkdir()
    with pytest.raises(SecateurError, match="holds the model itself"):
        run_recipe({**recipe, "model": str(tmp_path / "out" / "stages" / "1-finetune")}, tmp_path / "out")


def test_a_stage_begun_with_other_threads_begins_anew(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage that was stopped is done again from its start, and the one before it is not."""
    recipe = quick(EXAMPLES[0], dense)
    recipe["stages"] = [{"finetune": {"epochs": 1}}, {"method": "ptf", "budget": "macs<=80%", "set": QUICK["ptf"]}]

    def stop(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("secateur.compressing.time_interleaved", stop)
        run_recipe(recipe, tmp_path / "out")
    assert (tmp_path / "out.run" / "2-ptf.run" / "run.json").is_file()
    monkeypatch.setattr("secateur.composing.finetune", stop)
    monkeypatch.setattr("secateur.starting.torch.get_num_threads", lambda: 99)
    result = run_recipe(recipe, tmp_path / "out", resume=True, seconds=0.02)
    assert result.after.macs <= 0.8 * result.before.macs


def test_a_recipe_may_begin_with_a_model_without_a_head(dense: Path, tmp_path: Path) -> None:
    """What is compared with is then the model that fine-tuning left."""
    tiny_model("bert").bert.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    recipe = quick(EXAMPLES[0], dense) | {"model": str(tmp_path / "base")}
    recipe["stages"] = [{"finetune": {"epochs": 1}}, {"method": "ptf", "budget": "macs<=80%", "set": QUICK["ptf"]}]
    result = run_recipe(recipe, tmp_path / "out", seconds=0.02)
    assert result.after.macs <= 0.8 * result.before.macs
    ptf = json.loads((tmp_path / "out" / "stages" / "2-ptf" / "result.json").read_text())
    assert result.before.metrics == ptf["before"]["metrics"]
    assert result.after.metrics == ptf["after"]["metrics"]


def test_classes_in_another_order_are_compared_as_they_are_named(dense: Path, tmp_path: Path) -> None:
    """The first model knows its classes the other way round than fine-tuning names them."""
    model = tiny_model("bert")
    model.config.id2label, model.config.label2id = {0: "1", 1: "0"}, {"1": 0, "0": 1}
    model.save_pretrained(dense)
    recipe = quick(EXAMPLES[0], dense) | {
        "stages": [{"method": "ptf", "set": QUICK["ptf"]}, {"finetune": {"epochs": 1}}]
    }
    result = run_recipe(recipe, tmp_path / "out", seconds=0.02)
    change = result.after.metrics["accuracy"] - result.before.metrics["accuracy"]
    assert result.task["difference"][0] == pytest.approx(change)


def test_the_command_line(dense: Path, tmp_path: Path) -> None:
    recipe = {"model": str(dense), "task": {"data": str(dense.with_name("data"))}}
    recipe["stages"] = [{"method": "ptf", "budget": "macs<=80%", "set": QUICK["ptf"]}]  # type: ignore[assignment]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["method"] == {"name": "recipe", "stages": ["ptf macs<=80%"]}


def test_numbers_as_people_write_them() -> None:
    """YAML takes 5e-5 for text."""
    stages = yaml.safe_load("- {finetune: {lr: 5e-5}}\n- {method: late, set: {lr: 1e-4}}")
    first, second = Recipe.parse({"model": "m", "task": "sst2", "stages": stages}).stages
    assert first.does.lr == 5e-5  # type: ignore[union-attr]
    assert second.does.lr == 1e-4  # type: ignore[union-attr]
    assert second.budget == "speedup>=2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "A recipe is a mapping of keys to values, not list"),
        ({"model": "m"}, "A recipe lacks stages, task"),
        ({"stage": []}, "A recipe has no stage: it has batch, model, .*, stages, "),
        ({"stages": []}, "'stages', a list of one or more"),
        ({"task": {"data": "x", "column": "y"}}, "'task' has no column: it has data, label, metric, text"),
        ({"stages": [{}]}, "Stage 1 has one of method, search, finetune"),
        ({"stages": [{"method": "ptf"}, {"method": "bit", "budgets": "bits<=1"}]}, "Stage 2 has no budgets"),
        ({"stages": [{"method": "ptf", "pick": "knee"}]}, "Stage 1 has no pick"),
        ({"stages": [{"method": "xyz"}]}, "Stage 1: Unknown method 'xyz'"),
        ({"stages": [{"method": "ptf", "set": {"epoch": 1}}]}, "Stage 1: Method 'ptf' has no setting epoch"),
        ({"stages": [{"method": "ptf", "budget": "bits<=1"}]}, "Stage 1: ptf takes no 'bits' budget"),
        ({"stages": [{"search": "optin"}]}, "Stage 1: optin makes one model, not a front"),
        ({"stages": [{"search": "nas", "pick": "best"}]}, "Stage 1: Unknown budget 'best'"),
        ({"stages": [{"search": "nas", "objectives": "error,joy"}]}, "Stage 1: There is no objective 'joy'"),
        ({"stages": [{"finetune": {"rate": 1}}]}, "Stage 1, finetune, has no rate: it has batch_size"),
        ({"stages": [{"finetune": {"epochs": 0}}]}, "Stage 1: finetune: epochs is a whole number from 1"),
        ({"stages": [{"finetune": {"dropout": 3}}]}, "Stage 1: finetune: dropout is a share"),
        ({"stages": [{"search": "nas", "objectives": 5}]}, "Stage 1: 'objectives' is a list of names, not 5"),
        ({"stages": [{"search": "nas", "pick": "latency<=5ms"}]}, "Stage 1: pick takes no 'latency' budget"),
        ({"stages": [{"method": "bit"}, {"method": "ptf"}]}, "bit is the last stage"),
        ({"stages": [{"method": "late"}, {"method": "bit"}, {"method": "late"}]}, "late is there once"),
        ({"stages": [{"method": "bit"}, {"method": "late"}, {"method": "ptf"}]}, "or late comes behind it"),
        ({"stages": [{"finetune": {}}]}, "A recipe has a stage that cuts"),
        ({"stages": [{"method": "ptf", "set": {"method": 1}}]}, "Stage 1: Method 'ptf' has no setting method"),
        ({"batch": "two"}, "batch is a whole number, not 'two'"),
        ({"tokens": 0}, "tokens is a whole number, not 0"),
        ({"task": {"data": 3}}, "task, data is a text, not 3"),
        ({"model": None}, "model is a text, not None"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(content: Any, message: str) -> None:
    usual = {"model": "m", "task": "sst2", "stages": [{"method": "ptf"}]}
    whole = (
        {"model": "m"} if content == {"model": "m"} else {**usual, **content} if isinstance(content, dict) else content
    )
    with pytest.raises(SecateurError, match=message):
        Recipe.parse(whole)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="There is no recipe"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    with pytest.raises(SecateurError, match="is no YAML"):
        Recipe.read(tmp_path / "bad.yaml")
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(SecateurError, match="is no YAML"):
        Recipe.read(tmp_path / "evil.yaml")
