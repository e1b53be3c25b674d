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
COMMON = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-psabi")
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
    """The library, made in a folder: every tier that the compiler knows.

    Raises:
        CannotCompile: the compiler fails.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    there: list[str] = []
    for tier in TIERS if x86 else TIERS[:1]:
        done = _object(compiler, tier, FLAGS[tier].split(), folder)
        if done.returncode != 0:
            break
        there.append(tier)
    if there:
        done = _object(compiler, "engine", [f"-DSEC_{tier.upper()}" for tier in there], folder)
    target = folder / "secateur.so"
    if done.returncode == 0:
        parts = [str(folder / f"{name}.o") for name in (*there, "engine")]
        done = _run([compiler, "-shared", "-pthread", *parts, "-o", str(target)])
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise CannotCompile(f"{compiler} cannot build the native engine: {(lines or ['no message'])[0].strip()}")
    target.chmod(0o755)
    return target


def _object(compiler: str, name: str, flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    files = ["-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o")]
    return _run([compiler, *COMMON, *flags, *files])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
