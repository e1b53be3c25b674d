"""The native library: brought by the wheel, or built once for this machine's compiler and kept in the cache folder."""

from __future__ import annotations

import ctypes
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from secateur.errors import SecateurError
from secateur.paths import cache_dir
from secateur.runtime import compiling
from secateur.runtime.compiling import TIERS

__all__ = ["TIERS", "CannotBuild", "built", "library"]


class CannotBuild(SecateurError):
    """The native library cannot be had here."""


_failed: dict[str, CannotBuild] = {}


def library() -> ctypes.CDLL:
    """The native library, built at the first call.

    Raises:
        CannotBuild: there is no C++ compiler and no library in the wheel or the cache, or the compiler fails.
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
    """The library's file: the one beside its sources if it was made of them, else one in the cache.

    It is built if it is in neither; without a compiler any of these sources in the cache will do.

    Raises:
        CannotBuild: there is no compiler, or it fails, or others may write into the cache.
    """
    stem = compiling.stem()
    brought = compiling.SOURCES / f"{stem}.so"
    if brought.is_file():
        return brought
    try:
        return _cached(stem)
    except compiling.CannotCompile as error:
        raise CannotBuild(str(error)) from None


def _cached(stem: str) -> Path:
    compiler = compiling.compiler()
    folder = cache_dir() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    if compiler is None:
        found = sorted(folder.glob(f"{stem}-*.so"))
        if not found:
            raise CannotBuild(
                "The native engine is built by a C++ compiler, and there is none: install one (apt install g++) or set "
                "CXX."
            )
        return _check_owner(found[0])
    target = folder / f"{stem}-{compiling.version_of(compiler)}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as spare:
            os.replace(compiling.compiled(compiler, Path(spare)), target)
    return _check_owner(target)


def _check_owner(path: Path) -> Path:
    """What is in the cache is run: nobody else may have put it there."""
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
            raise CannotBuild(f"'{path}' could be written by others: set SECATEUR_CACHE to a folder of your own.")
    return path
