"""The native library from its sources. Imports nothing of secateur: the build hook loads this file by its path."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).with_name("native")
TIERS = ("portable", "avx2", "avx512", "amx")
"""Instructions from the fewest to the most; each has those before it."""
COMPILERS = ("c++", "g++", "clang++")
COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma"
FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": _AVX512,
    "amx": f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16",
}


class CannotCompile(RuntimeError):
    """There is no compiler, or it fails."""


def stem() -> str:
    """What files of the library's name begins with: the same for the same sources, flags and kind of machine."""
    sources = [file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.[hc]*"))]
    return f"secateur-{_digest(platform.machine(), repr((COMMON, FLAGS)), *sources)}"


def compiler() -> str | None:
    """The first compiler there is; None without one.

    Raises:
        CannotCompile: CXX names one that is not there.
    """
    wanted = os.environ.get("CXX")
    if wanted and not shutil.which(wanted):
        raise CannotCompile(f"CXX names a compiler that is not there: '{wanted}'.")
    return wanted or next((name for name in COMPILERS if shutil.which(name)), None)


def version_of(compiler: str) -> str:
    """A hash of what a compiler says of itself."""
    return _digest(_run([compiler, "--version"]).stdout)


def compiled(compiler: str, folder: Path) -> Path:
    """The library, made in a folder: every tier that the compiler knows; without OpenMP if it has none.

    Raises:
        CannotCompile: the compiler fails.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    problem = ""
    for parallel in (["-fopenmp"], []):
        objects, tiers, problem = [], [], ""
        for tier in TIERS if x86 else TIERS[:1]:
            done = _object(compiler, f"{tier}.cpp", [*FLAGS[tier].split(), *parallel], folder)
            if done.returncode != 0:
                problem = done.stderr
                break
            objects.append(folder / f"{tier}.o")
            tiers.append(f"-DSEC_{tier.upper()}")
        if not objects:
            continue
        done = _object(compiler, "engine.cpp", [*tiers, *parallel], folder)
        if done.returncode == 0:
            target = folder / "secateur.so"
            parts = [*map(str, objects), str(folder / "engine.o")]
            done = _run([compiler, "-shared", *parallel, *parts, "-o", str(target)])
            if done.returncode == 0:
                target.chmod(0o755)
                return target
        problem = done.stderr
    lines = [line for line in problem.splitlines() if "error" in line] or problem.splitlines() or ["no message"]
    raise CannotCompile(f"{compiler} cannot build the native engine: {lines[0].strip()}")


def _object(compiler: str, source: str, flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    target = folder / Path(source).with_suffix(".o").name
    return _run([compiler, *COMMON, *flags, "-c", str(SOURCES / source), "-o", str(target)])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
