"""Prune pre-trained transformers to a budget, and measure what came out.

Importing it registers the plug-in that lets `AutoModelFor….from_pretrained` open secateur folders; every other
module is loaded when a public name of it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import secateur.hub as _plug_in  # noqa: F401  (registers with transformers)

if TYPE_CHECKING:
    from secateur import families, runtime
    from secateur.api import compare_engines, compress, dial, evaluate, export, finetune, measure, run_recipe, search
    from secateur.binary import binarize
    from secateur.bits.integer import packed_twin
    from secateur.edits import DropTokens, Slice, apply_edits
    from secateur.edits.sparsify import hold_zeros
    from secateur.front import Front
    from secateur.methods.bit import Bit
    from secateur.methods.late import Late
    from secateur.methods.mgpp import Mgpp
    from secateur.methods.nas import Nas
    from secateur.methods.optin import Optin
    from secateur.methods.ptf import Ptf
    from secateur.results import Result
    from secateur.runtime import choose_kernels
    from secateur.subnetwork import SubNetwork
    from secateur.tasks import Task, load_task
    from secateur.train import CompressionTrainer, Pruning, PruningSettings
    from secateur.zeros import slice_zeros, sparsify

__version__ = "0.1.0"

_HOME = {
    "Bit": "methods.bit",
    "CompressionTrainer": "train",
    "DropTokens": "edits",
    "Front": "front",
    "Late": "methods.late",
    "Mgpp": "methods.mgpp",
    "Nas": "methods.nas",
    "Optin": "methods.optin",
    "Pruning": "train",
    "PruningSettings": "train",
    "Ptf": "methods.ptf",
    "Result": "results",
    "Slice": "edits",
    "SubNetwork": "subnetwork",
    "Task": "tasks",
    "apply_edits": "edits",
    "binarize": "binary",
    "choose_kernels": "runtime",
    "compare_engines": "api",
    "compress": "api",
    "dial": "api",
    "evaluate": "api",
    "export": "api",
    "finetune": "api",
    "hold_zeros": "edits.sparsify",
    "load_task": "tasks",
    "measure": "api",
    "packed_twin": "bits.integer",
    "run_recipe": "api",
    "search": "api",
    "slice_zeros": "zeros",
    "sparsify": "zeros",
}

__all__ = [
    "Bit",
    "CompressionTrainer",
    "DropTokens",
    "Front",
    "Late",
    "Mgpp",
    "Nas",
    "Optin",
    "Pruning",
    "PruningSettings",
    "Ptf",
    "Result",
    "Slice",
    "SubNetwork",
    "Task",
    "__version__",
    "apply_edits",
    "binarize",
    "choose_kernels",
    "compare_engines",
    "compress",
    "dial",
    "evaluate",
    "export",
    "families",
    "finetune",
    "hold_zeros",
    "load_task",
    "measure",
    "packed_twin",
    "run_recipe",
    "runtime",
    "search",
    "slice_zeros",
    "sparsify",
]


def __getattr__(name: str) -> object:
    if name in ("families", "runtime"):
        return import_module(f"secateur.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    value = getattr(import_module(f"secateur.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
