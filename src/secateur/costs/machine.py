"""What this machine is: milliseconds mean nothing without it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "asimd", "sve")
"""Instruction sets that decide how fast a transformer runs."""


def fingerprint() -> dict[str, Any]:
    """Hardware and software of this machine, as plain JSON values.

    Returns:
        cpu, cores, flags, memory_gb, os, python, torch, transformers.
    """
    info = _cpuinfo()
    present = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": _cores(),
        "flags": [flag for flag in FLAGS if flag in present],
        "memory_gb": _memory_gb(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine_id() -> str:
    """Short hash of the hardware, the same before and after software updates."""
    found = fingerprint()
    hardware = {name: found[name] for name in ("cpu", "cores", "flags")}
    return hashlib.sha256(json.dumps(hardware, sort_keys=True).encode()).hexdigest()[:12]


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of Linux's /proc/cpuinfo; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cores() -> int:
    """Cores that this process may use, fewer than the machine's in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gb() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return 0.0
