"""Read tables of text: CSV, TSV, JSON lines, Parquet; one file, or a folder with a file per split."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import InvalidData

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
STEMS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SHARD = re.compile(r"-\d+-of-\d+$")


def read_file(path: Path) -> Dataset:
    """Read one table.

    Args:
        path: a `.csv`, `.tsv` (without quoting), `.jsonl`, `.json` or `.parquet` file, in UTF-8.

    Raises:
        InvalidData: if the file cannot be read, or has no rows.
    """
    from datasets import Dataset

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidData(f"{path}: unknown file type {suffix!r}; use one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise InvalidData(f"{path} is empty: it needs a header or keys, and one row per example")
    import pyarrow as pa

    try:
        table = _read_table(path, suffix)
        twice = {name for name in table.column_names if table.column_names.count(name) > 1}
        if twice:
            raise ValueError(f"it has two columns named {min(twice)!r}, rename one")
        data = Dataset(_plain(table))
    except (pa.ArrowException, ValueError, UnicodeDecodeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidData(f"cannot read {path} as {suffix[1:]}: {reason[:160]}") from error
    if table.num_rows == 0:
        raise InvalidData(f"{path} has no rows: it needs one row per example")
    for field in table.schema:
        if suffix != ".parquet" and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)):
            raise InvalidData(f"column {field.name!r} of {path} is not UTF-8 text: convert the file to UTF-8")
    return data


def _plain(table: pa.Table) -> pa.Table:
    """Turn categories (dictionary columns) into the values that they stand for."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return table


def read_folder(folder: Path, *, validation: str = "validation") -> dict[str, Dataset]:
    """Read the train, validation and test files of a folder, or a dataset saved there by `save_to_disk`.

    Args:
        folder: holds files named `train*`, `validation*` (or `valid*`, `val*`, `dev*`) and `test*`; shards named
            `train-00000-of-00002` are joined.
        validation: the stem that wins when several validation files are there.

    Raises:
        InvalidData: if there is none, or several for one split.
    """
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _read_saved(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    splits: dict[str, Dataset] = {}
    for split, stems in STEMS.items():
        wanted = (validation, *stems) if split == "validation" else stems
        shards = _choose(folder, split, wanted, files)
        if shards:
            splits[split] = _join(shards)
    if not splits:
        found = ", ".join(path.name for path in files) or "no data files"
        raise InvalidData(
            f"{folder} has no train, validation or test file (found: {found}): name them train.csv, validation.csv, "
            f"test.csv (or {', '.join(SUFFIXES[1:])}), or give one file"
        )
    return splits


def _read_saved(folder: Path) -> dict[str, Dataset]:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    return {str(name): data for name, data in saved.items()} if isinstance(saved, DatasetDict) else {"all": saved}


def _choose(folder: Path, split: str, stems: tuple[str, ...], files: list[Path]) -> list[Path]:
    """Return the file of a split, or its shards: an exact name first, else anything that starts with it."""
    for stem in stems:
        exact = [path for path in files if SHARD.sub("", path.stem).lower() == stem]
        if len({(SHARD.sub("", path.stem), path.suffix) for path in exact}) == 1:
            return exact
        if exact:
            raise InvalidData(_ambiguous(folder, split, exact))
    loose = [path for path in files if re.split(r"[^a-z]", path.stem.lower())[0] in stems]
    if len({(SHARD.sub("", path.stem), path.suffix) for path in loose}) > 1:
        raise InvalidData(_ambiguous(folder, split, loose))
    return loose


def _ambiguous(folder: Path, split: str, files: list[Path]) -> str:
    names = ", ".join(path.name for path in files)
    return f"{folder} has several {split} files ({names}): keep one, or name it {split}{files[0].suffix}"


def _join(paths: list[Path]) -> Dataset:
    from datasets import concatenate_datasets

    return read_file(paths[0]) if len(paths) == 1 else concatenate_datasets([read_file(path) for path in paths])


def _read_table(path: Path, suffix: str) -> pa.Table:
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    if suffix == ".parquet":
        return pyarrow.parquet.read_table(path)
    # One block for the whole file, so that a column's type is inferred from all of its rows.
    block = min(path.stat().st_size + 1, 2**31 - 1)
    if suffix in (".csv", ".tsv"):
        tabs = suffix == ".tsv"
        # Tab-separated files as they circulate (GLUE) hold stray quotation marks that quote nothing.
        parse = pyarrow.csv.ParseOptions(
            delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
        )
        read = pyarrow.csv.ReadOptions(block_size=block)
        return pyarrow.csv.read_csv(path, read_options=read, parse_options=parse)
    with path.open(encoding="utf-8-sig") as file:
        array = file.read(1) == "["
    return (
        _from_array(path)
        if array
        else pyarrow.json.read_json(path, read_options=pyarrow.json.ReadOptions(block_size=block))
    )


def _from_array(path: Path) -> pa.Table:
    """Read a `.json` file that is one array of objects."""
    import pyarrow as pa

    rows: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("the array must hold one object per example")
    return pa.Table.from_pylist(rows)
