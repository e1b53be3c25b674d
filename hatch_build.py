"""Build hook: with SECATEUR_BUILD_NATIVE=1 the wheel brings the native engine, else it is pure Python and sources."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("src/secateur/runtime")


class NativeBuildHook(BuildHookInterface[Any]):
    """Puts the library next to its sources, under the name by which `secateur.runtime.build` looks for it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._folder = ""
        wanted = os.environ.get("SECATEUR_BUILD_NATIVE", "0") not in ("", "0")
        if not wanted or self.target_name != "wheel" or version == "editable":
            return
        compiling = _module(Path(self.root) / PACKAGE / "compiling.py")
        compiler = compiling.compiler()
        if compiler is None:
            raise compiling.CannotCompile("SECATEUR_BUILD_NATIVE is set, and there is no C++ compiler: install one.")
        self._folder = tempfile.mkdtemp()
        try:
            library = compiling.compiled(compiler, Path(self._folder))
        except compiling.CannotCompile:
            self.finalize(version, build_data, "")
            raise
        place = compiling.SOURCES.relative_to(Path(self.root) / "src") / f"{compiling.stem()}.so"
        build_data["force_include"][str(library)] = place.as_posix()
        build_data["pure_python"] = False
        # Opened with ctypes: any Python of this platform will do.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _module(file: Path) -> ModuleType:
    """A module by its path: the package itself needs torch, which is not here."""
    spec: Any = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(ModuleType, module)
