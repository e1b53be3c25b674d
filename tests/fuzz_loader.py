"""Damaged folders: `secateur.runtime.load` refuses them in one line or runs them, and never takes the process along.

    python -m tests.fuzz_loader --seconds 300

A parent counts what a child says of each case, and starts another child where one dies or hangs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

KINDS = ("dense", "sliced", "binary", "dialled", "modern")
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2,
    7,
    65,
    1e-30,
    0.5,
    -1.5,
    10**6,
    2**31,
    2**63,
    "",
    "gelu",
    "é",
    [],
    [0],
    {},
    [[]],
)
PATIENCE = 30.0
"""Seconds that a case may take."""
MEMORY = 8 << 30


def make_folders(where: Path) -> None:
    """One small model of each kind."""
    import secateur
    from secateur.edits import Slice, apply_edits
    from tests.conftest import tiny_model
    from tests.contract.test_engine_bits import binary
    from tests.contract.test_engine_tokens import dialled
    from tests.contract.test_families import cut

    sliced: Any = tiny_model("bert")
    edits = [Slice(cut(sliced, "layer without both"))]
    apply_edits(sliced, edits)
    secateur.hub.attach(sliced, edits)
    models = {
        "dense": tiny_model("bert"),
        "sliced": sliced,
        "binary": binary(tiny_model("bert")),
        "dialled": dialled(tiny_model("bert")),
        "modern": tiny_model("modernbert"),
    }
    for kind in KINDS:
        models[kind].save_pretrained(where / kind)


def damage(folder: Path, source: random.Random) -> str:
    """Change one to three things in a folder, and say which."""
    return ", ".join(
        source.choice((_bytes, _bytes, _header, _value, _value, _value))(folder, source)
        for _ in range(source.choice((1, 1, 2, 3)))
    )


def _bytes(folder: Path, source: random.Random) -> str:
    file = folder / source.choice(("config.json", "model.safetensors", "model.safetensors"))
    found = bytearray(file.read_bytes())
    how = source.choice(("flip", "truncate", "replace", "insert")) if found else "insert"
    place = source.randrange(len(found)) if found else 0
    if how == "flip":
        for _ in range(source.choice((1, 8, 64))):
            found[source.randrange(len(found))] ^= 1 << source.randrange(8)
    elif how == "truncate":
        del found[place:]
    else:
        count = source.randrange(1, 64)
        end = place + count if how == "replace" else place
        found[place:end] = source.randbytes(count)
    file.write_bytes(found)
    return f"{how} {file.name} at {place}"


def _header(folder: Path, source: random.Random) -> str:
    """A value in the header of the weights, whose length is kept right."""
    file = folder / "model.safetensors"
    found = file.read_bytes()
    size = int.from_bytes(found[:8], "little")
    try:
        header = json.loads(found[8 : 8 + size])
        what = _replaced(header, source)
    except ValueError:
        return "header not read"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + found[8 + size :])
    return f"header {what}"


def _value(folder: Path, source: random.Random) -> str:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
        what = _replaced(config, source)
    except ValueError:
        return "config not read"
    file.write_text(json.dumps(config))
    return f"config {what}"


def _replaced(tree: Any, source: random.Random) -> str:
    """Replace, remove or nudge a value anywhere in a tree."""
    places = list(_places(tree))
    if not places:
        return "empty"
    path, owner, key = source.choice(places)
    how = source.choice(("replace", "replace", "nudge", "remove"))
    if how == "remove":
        del owner[key]
    elif how == "nudge" and type(owner[key]) in (int, float):
        owner[key] += source.choice((-1, 1, 3))
    else:
        owner[key] = source.choice(ODD)
    return f"{path} = {owner[key]!r}" if how != "remove" else f"{path} removed"


def _places(tree: Any, path: str = "") -> Any:
    if not isinstance(tree, (dict, list)):
        return
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield f"{path}/{key}", tree, key
        yield from _places(tree[key], f"{path}/{key}")


def outcome(folder: Path) -> tuple[str, str]:
    """What loading and one run end with: a word to count, and where it came from if it is no clear error."""
    from secateur.errors import SecateurError
    from secateur.runtime import load

    try:
        with load(folder, threads=1) as engine:
            found = engine([[5, 6, 7], [8], list(range(9, 21))])
        logits = found if hasattr(found, "isfinite") else found[0]
        return "ran" if bool(logits.isfinite().all()) else "ran, not finite", ""
    except SecateurError as error:
        return ("refused", "") if "\n" not in str(error) else ("refused in several lines", str(error)[:300])
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "secateur" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return "unexpected", f"{type(error).__name__} at {where}: {str(error)[:200]}"


def child(folders: Path) -> None:
    """Answer seeds on standard input, a line each."""
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # whose shadow takes more; it has a limit of its own
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch
    import transformers

    import secateur.runtime  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    for line in sys.stdin:
        source = random.Random(int(line))
        kind = source.choice(KINDS)
        with tempfile.TemporaryDirectory() as spare:
            folder = Path(shutil.copytree(folders / kind, Path(spare) / "model"))
            (folders / "case").write_text(f"{kind}: {damage(folder, source)}")  # told even if this process dies
            print(json.dumps(outcome(folder)), flush=True)


class Child:
    """A process that answers seeds."""

    def __init__(self, folders: Path) -> None:
        command = [sys.executable, "-m", "tests.fuzz_loader", "--child", str(folders)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.answer(4 * PATIENCE)

    def ask(self, seed: int) -> tuple[str, str]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        line = self.answer(PATIENCE)
        if line:
            found, where = json.loads(line)
            return found, where
        if line is None:
            self.close()
            return "too slow", ""
        return f"died with exit code {self.process.wait()}", ""

    def answer(self, seconds: float) -> str | None:
        """The next line; empty if the process died, None if it took too long."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def fuzz(folders: Path, seeds: range, seconds: float = float("inf")) -> tuple[collections.Counter[str], list[str]]:
    """Counts of what cases ended with, and a line for each that is no answer."""
    counts: collections.Counter[str] = collections.Counter()
    findings: list[str] = []
    end, at_work = time.monotonic() + seconds, Child(folders)
    for seed in seeds:
        if time.monotonic() > end:
            break
        if at_work.process.poll() is not None:
            at_work = Child(folders)
        found, where = at_work.ask(seed)
        counts[found] += 1
        if found not in ("ran", "ran, not finite", "refused"):
            findings.append(f"{seed}: {found} {where} ({(folders / 'case').read_text()})")
            print(findings[-1], flush=True)
    at_work.close()
    return counts, findings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    with tempfile.TemporaryDirectory() as where:
        make_folders(Path(where))
        counts, findings = fuzz(Path(where), range(given.first, given.first + 10**9), given.seconds)
    print(dict(counts))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
