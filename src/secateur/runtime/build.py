"""The native library: built once for this machine's compiler, kept in the cache folder, and opened with ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from secateur.errors import SecateurError
from secateur.paths import cache_dir

SOURCES = Path(__file__).with_name("native")
TIERS = ("portable", "avx2", "avx512", "amx")
"""Instructions from the fewest to the most; each has those before it."""
VERSION = 1
COMPILERS = ("c++", "g++", "clang++")
COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma"
FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": _AVX512,
    "amx": f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16",
}


class NoCompiler(SecateurError):
    """There is nothing to build the native library with."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The native library, built at the first call.

    Raises:
        NoCompiler: there is no C++ compiler and no library in the cache.
        SecateurError: the compiler fails.
    """
    found = ctypes.CDLL(str(built()))
    if found.sec_version() != VERSION:
        raise SecateurError("The native library is of another version: empty the cache folder.")
    found.sec_open.restype = ctypes.c_void_p
    found.sec_bytes.restype = ctypes.c_int64
    return found


def built() -> Path:
    """The library's file, which is built if it is not in the cache."""
    compiler = os.environ.get("CXX") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None or shutil.which(compiler) is None:
        raise NoCompiler(
            "The native engine is built by a C++ compiler, and there is none: install one (apt install g++) or set CXX."
        )
    sources = sorted(SOURCES.iterdir())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    identity = [version, platform.machine(), repr((COMMON, FLAGS)), *(file.read_text() for file in sources)]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = cache_dir() / "native"
    target = folder / f"secateur-{name}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as spare:
            os.replace(_compile(compiler, Path(spare)), target)
    return target


def _compile(compiler: str, folder: Path) -> Path:
    """Every tier that the compiler knows, in one library; without OpenMP if it has none."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    wanted = TIERS if x86 else TIERS[:1]
    problem = ""
    for parallel in (["-fopenmp"], []):
        objects, tiers = [], []
        for tier in wanted:
            done = _object(compiler, f"{tier}.cpp", [*FLAGS[tier].split(), *parallel], folder)
            if done.returncode != 0:
                problem = problem or done.stderr
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
                return target
        problem = done.stderr
    lines = [line for line in problem.splitlines() if "error" in line] or problem.splitlines() or ["no message"]
    raise SecateurError(f"{compiler} cannot build the native engine: {lines[0].strip()}")


def _object(compiler: str, source: str, flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    target = folder / Path(source).with_suffix(".o").name
    return _run([compiler, *COMMON, *flags, "-c", str(SOURCES / source), "-o", str(target)])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
