"""The root package: light, complete, and the same whatever was imported before."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import secateur

OPTIONAL = ("onnx", "onnxruntime", "onnxscript", "openvino", "ray", "fastapi")
LATE = ("datasets", "optuna", "plotly", "torchmetrics")


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", secateur.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(secateur, name) is not None
    assert name in dir(secateur)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        _ = secateur.prune_everything  # type: ignore[attr-defined]


def test_version_is_the_installed_one() -> None:
    assert secateur.__version__ == version("secateur")


def test_import_is_light() -> None:
    loaded = python("import sys, secateur; print(*sys.modules)").split()
    assert "secateur.api" not in loaded
    assert not set(loaded) & {*OPTIONAL, *LATE}


def test_verbs_stay_functions_when_modules_of_the_same_name_are_loaded() -> None:
    verbs = ("compress", "measure", "evaluate", "export", "finetune", "load_task")
    code = (
        "import importlib, pkgutil, secateur\n"
        "for module in pkgutil.iter_modules(secateur.__path__): importlib.import_module('secateur.' + module.name)\n"
        f"print(*(name for name in {verbs} if not callable(getattr(secateur, name))))"
    )
    assert python(code).split() == []


def declared(extra: str) -> set[str]:
    """Distributions that `secateur[extra]` installs; the base ones for an empty name."""
    found = [Requirement(line) for line in requires("secateur") or ()]
    return {
        r.name
        for r in found
        if (r.marker is None) is (extra == "") and (not r.marker or r.marker.evaluate({"extra": extra}))
    }


def test_optional_packages_are_not_required() -> None:
    assert not declared("") & set(OPTIONAL)
    assert declared("onnx") == {"onnx", "onnxruntime", "onnxscript"}


def test_every_imported_package_is_declared() -> None:
    imported = set()
    for file in Path(secateur.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"secateur"}
    found = packages_distributions()  # PyYAML is imported as yaml
    assert {name.lower() for module in others for name in found.get(module, [module])} - declared("") == set()
