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
COMPILERS = ("c++", "g++", "clang++")
COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma"
FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": _AVX512,
    "amx": f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16",
}


class CannotBuild(SecateurError):
    """The native library cannot be had here."""


_failed: dict[str, CannotBuild] = {}


def library() -> ctypes.CDLL:
    """The native library, built at the first call.

    Raises:
        CannotBuild: there is no C++ compiler and no library in the cache, or the compiler fails.
    """
    key = f"{os.environ.get('CXX')} {cache_dir()}"
    if key in _failed:
        raise _failed[key]
    try:
        return _opened(built())
    except (CannotBuild, OSError) as error:
        problem = (
            error if isinstance(error, CannotBuild) else CannotBuild(f"The native engine cannot be built: {error}")
        )
        _failed[key] = problem
        raise problem from None


@lru_cache
def _opened(file: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    found.sec_open.restype = ctypes.c_void_p
    found.sec_bytes.restype = ctypes.c_int64
    return found


def built() -> Path:
    """The library's file, which is built if it is not in the cache; without a compiler any of these sources will do.

    Raises:
        CannotBuild: there is no compiler, or it fails, or others may write into the cache.
    """
    compiler = _compiler()
    sources = [file.read_text() for file in sorted(SOURCES.glob("*.[hc]*"))]
    what = _digest(platform.machine(), repr((COMMON, FLAGS)), *sources)
    folder = cache_dir() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    if compiler is None:
        found = sorted(folder.glob(f"secateur-{what}-*.so"))
        if not found:
            raise CannotBuild(
                "The native engine is built by a C++ compiler, and there is none: install one (apt install g++) or set "
                "CXX."
            )
        return _check_owner(found[0])
    target = folder / f"secateur-{what}-{_digest(_run([compiler, '--version']).stdout)}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as spare:
            os.replace(_compile(compiler, Path(spare)), target)
    return _check_owner(target)


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    if wanted and not shutil.which(wanted):
        raise CannotBuild(f"CXX names a compiler that is not there: '{wanted}'.")
    return wanted or next((name for name in COMPILERS if shutil.which(name)), None)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _check_owner(path: Path) -> Path:
    """What is in the cache is run: nobody else may have put it there."""
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
            raise CannotBuild(f"'{path}' could be written by others: set SECATEUR_CACHE to a folder of your own.")
    return path


def _compile(compiler: str, folder: Path) -> Path:
    """Every tier that the compiler knows, in one library; without OpenMP if it has none."""
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
    raise CannotBuild(f"{compiler} cannot build the native engine: {lines[0].strip()}")


def _object(compiler: str, source: str, flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    target = folder / Path(source).with_suffix(".o").name
    return _run([compiler, *COMMON, *flags, "-c", str(SOURCES / source), "-o", str(target)])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
