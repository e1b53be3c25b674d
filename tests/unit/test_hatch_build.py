"""The build hook: a wheel is pure unless it is asked for the native engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from secateur.runtime import compiling

ROOT = Path(__file__).parents[2]


class Interface:
    """What hatchling gives a hook, which is not installed with the tests."""

    def __init__(self, target: str) -> None:
        self.root, self.target_name = str(ROOT), target

    def __class_getitem__(cls, item: Any) -> type:
        return cls


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    name = "hatchling.builders.hooks.plugin.interface"
    for part in range(1, 6):
        module = ModuleType(".".join(name.split(".")[:part]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules[name].BuildHookInterface = Interface  # type: ignore[attr-defined]
    spec: Any = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def initialized(hooks: Any, version: str = "standard", target: str = "wheel") -> tuple[Any, dict[str, Any]]:
    hook, data = hooks.NativeBuildHook(target), {"pure_python": True, "force_include": {}}
    hook.initialize(version, data)
    return hook, data


def made_up(compiler: str | None) -> Any:
    def compiled(name: str, folder: Path) -> Path:
        (folder / "secateur.so").write_bytes(b"")
        return folder / "secateur.so"

    return SimpleNamespace(
        compiler=lambda: compiler,
        compiled=compiled,
        stem=lambda: "secateur-0",
        SOURCES=ROOT / "src/secateur/runtime/native",
        CannotCompile=compiling.CannotCompile,
    )


@pytest.mark.parametrize(
    ("wanted", "version", "target"),
    [(None, "standard", "wheel"), ("0", "standard", "wheel"), ("1", "editable", "wheel"), ("1", "standard", "sdist")],
)
def test_nothing_is_compiled_unless_asked(
    hooks: Any, monkeypatch: pytest.MonkeyPatch, wanted: str | None, version: str, target: str
) -> None:
    monkeypatch.delenv("SECATEUR_BUILD_NATIVE", raising=False)
    if wanted is not None:
        monkeypatch.setenv("SECATEUR_BUILD_NATIVE", wanted)
    monkeypatch.setattr(hooks, "_module", None)
    hook, data = initialized(hooks, version, target)
    hook.finalize(version, data, "")
    assert data == {"pure_python": True, "force_include": {}}


def test_a_native_wheel_says_its_platform(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_BUILD_NATIVE", "1")
    monkeypatch.setattr(hooks, "_module", lambda file: made_up("c++"))
    hook, data = initialized(hooks)
    ((source, place),) = data["force_include"].items()
    assert Path(source).is_file()
    assert place == "secateur/runtime/native/secateur-0.so"
    assert not data["pure_python"]
    assert data["tag"].startswith("py3-none-")
    assert not set("-.") & set(data["tag"].removeprefix("py3-none-"))
    hook.finalize("standard", data, "")
    assert not Path(source).exists()


def test_without_a_compiler_it_says_so(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_BUILD_NATIVE", "1")
    monkeypatch.setattr(hooks, "_module", lambda file: made_up(None))
    with pytest.raises(compiling.CannotCompile, match="SECATEUR_BUILD_NATIVE is set, and there is no C"):
        initialized(hooks)


def test_the_compiling_module_stands_alone(hooks: Any) -> None:
    """It is loaded where neither secateur nor torch is installed."""
    module = hooks._module(ROOT / "src/secateur/runtime/compiling.py")
    assert module.stem() == compiling.stem()
    imports = [line for line in Path(module.__file__).read_text("utf-8").splitlines() if "import" in line.split()[:3]]
    assert {line.split()[1].partition(".")[0] for line in imports} <= set(sys.stdlib_module_names)
