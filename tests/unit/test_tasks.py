"""Loading data: names, files, columns, labels, splits, batches; each mistake names its fix."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from secateur.errors import InvalidData
from secateur.tasks import PRESETS, batches, check_labels, fingerprint, load_task, median_tokens
from secateur.tasks.split import split_rows
from tests.unit import tiny_text


def table(rows: int = 40, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"text {i}" for i in range(rows)], **columns})


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    return tmp_path


def write(folder: Path, name: str, frames: dict[str, pd.DataFrame]) -> None:
    (folder / name).mkdir()
    for stem, frame in frames.items():
        frame.to_parquet(folder / name / f"{stem}.parquet")


@pytest.mark.parametrize("name", ["sst2", "glue/sst2", "GLUE/SST2"])
def test_preset_from_folder(folder: Path, name: str) -> None:
    rows = pd.DataFrame({"sentence": ["a", "b"], "label": [0, 1]})
    write(folder, "sst2", {"train": rows, "validation": rows, "test_other": rows})
    task = load_task(name)
    assert (task.name, task.text_columns, task.label_names) == ("sst2", ("sentence",), ("negative", "positive"))
    assert (task.kind, task.num_labels, task.metric, task.metrics) == ("classification", 2, "accuracy", ("accuracy",))
    assert task.test is not None
    assert list(task.test["label"]) == [0, 1]


def test_stsb_is_a_regression_with_two_texts(folder: Path) -> None:
    rows = pd.DataFrame({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [0.5, 5.0], "genre": ["x", "y"]})
    write(folder, "stsb", {"train": rows, "validation": rows})
    task = load_task("stsb")
    assert (task.text_columns, task.label_column, task.kind) == (("sentence1", "sentence2"), "score", "regression")
    assert (task.num_labels, task.label_names, task.metrics) == (1, None, ("spearman", "pearson"))
    assert task.test is None


def test_mnli_takes_the_matched_rows(folder: Path) -> None:
    rows = pd.DataFrame({"premise": ["a"] * 3, "hypothesis": ["b"] * 3, "label": [0, 1, 2]})
    other = rows.assign(premise="z")
    write(folder, "mnli", {"train": rows, "validation_matched": rows, "validation_mismatched": other})
    task = load_task("mnli")
    assert list(task.split("validation")["premise"]) == ["a", "a", "a"]


def test_presets_have_the_official_metrics() -> None:
    metrics = {name: preset.metrics for name, preset in PRESETS.items()}
    assert metrics == {
        "cola": ("matthews", "accuracy"),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "stsb": ("spearman", "pearson"),
        "qqp": ("accuracy", "f1"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
    }


def test_preset_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    features = Features(
        {
            "sentence": Value("string"),
            "label": ClassLabel(names=["negative", "positive"]),
            "idx": Value("int32"),
        }
    )

    def rows(labels: list[int]) -> Dataset:
        content = {"sentence": [f"s{i}" for i in range(len(labels))], "label": labels, "idx": range(len(labels))}
        return Dataset.from_dict(content, features=features)

    asked = []

    def load(*names: str) -> DatasetDict:
        asked.append(names)
        return DatasetDict(train=rows([0, 1, 1]), validation=rows([1, 0]), test=rows([-1, -1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_task("sst2")
    assert asked == [("nyu-mll/glue", "sst2")]
    assert list(task.split("train")["label"]) == [0, 1, 1]
    assert task.test is None  # GLUE hides its labels


def test_no_hub_and_no_folder_says_how_to_get_the_data(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with pytest.raises(InvalidData, match="unset SECATEUR_DATA"):
        load_task("sst2")

    def offline(*_: str) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.delenv("SECATEUR_DATA")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InvalidData, match=r"SECATEUR_DATA.*cola/train\.parquet") as caught:
        load_task("cola")
    assert "\n" not in str(caught.value)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_file_type_reads_the_same(tmp_path: Path, suffix: str) -> None:
    frame = table(label=["good", "bad"] * 20)
    frame.loc[0, "text"] = "it is 'fine', or so"
    path = tmp_path / f"data{suffix}"
    if suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    task = load_task(path)
    assert {name: len(rows) for name, rows in task.splits().items()} == {"train": 32, "validation": 4, "test": 4}
    assert task.label_names == ("bad", "good")
    texts = {text for rows in task.splits().values() for text in rows["text"]}
    assert texts == set(frame["text"])
    assert fingerprint(task) == fingerprint(load_task(Dataset.from_pandas(frame)))


def test_csv_quoting_and_types_from_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    lines = ['"a, ""quoted""\ntext",0', *(f"t{i},{i % 2}" for i in range(20))]
    path.write_text("text,label\n" + "\n".join(lines), encoding="utf-8")
    task = load_task(path)
    assert 'a, "quoted"\ntext' in [text for rows in task.splits().values() for text in rows["text"]]
    assert task.kind == "classification"
    path.write_text("text,label\n" + "\n".join([*lines, "last,0.5"]), encoding="utf-8")
    assert load_task(path).kind == "regression"


def test_folder_of_splits(tmp_path: Path) -> None:
    table(label=[0, 1] * 20).to_csv(tmp_path / "train.csv", index=False)
    table(10, label=[0, 1] * 5).to_csv(tmp_path / "dev.csv", index=False)
    task = load_task(tmp_path)
    assert {name: len(rows) for name, rows in task.splits().items()} == {"train": 40, "validation": 10}
    assert (task.name, task.label_names) == (tmp_path.name, None)
    table(10, label=[0, 1] * 5).to_csv(tmp_path / "dev.tsv", index=False, sep="\t")
    with pytest.raises(InvalidData, match="several validation files"):
        load_task(tmp_path)


def test_categories_are_read_as_their_values(tmp_path: Path) -> None:
    table(label=pd.Categorical(["good", "bad"] * 20)).to_parquet(tmp_path / "data.parquet")
    assert load_task(tmp_path / "data.parquet").label_names == ("bad", "good")


def test_shards_are_joined_and_missing_validation_is_cut_from_train(tmp_path: Path) -> None:
    for i in range(2):
        frame = table(20, label=[0, 1] * 10)
        frame["text"] += f" {i}"
        frame.to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
    table(6, label=[0, 1] * 3).to_parquet(tmp_path / "test.parquet")
    task = load_task(tmp_path)
    assert {name: len(rows) for name, rows in task.splits().items()} == {"train": 36, "validation": 4, "test": 6}


def test_saved_dataset(tmp_path: Path) -> None:
    rows = Dataset.from_pandas(table(label=[0, 1] * 20))
    DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "saved")
    assert len(load_task(tmp_path / "saved").split("train")) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.xlsx", b"x", "unknown file type"),
        ("a.csv", b"text,text,label\na,b,0\n", "two columns named 'text'"),
        ("a.csv", b"text,label\na,0,1\n", "cannot read"),
        ("a.jsonl", b'{"text": "a"\n', "cannot read"),
        ("a.json", b"[1, 2]", "cannot read"),
        ("a.parquet", b"PAR1", "cannot read"),
        ("a.csv", b"text,label\n\xff\xfe,0\nb,1\n", "UTF-8"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=message) as caught:
        load_task(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="did you mean 'sst2'"):
        load_task("sst-2")
    with pytest.raises(InvalidData, match="no train, validation or test file"):
        load_task(tmp_path)
    with pytest.raises(InvalidData, match="splits part"):
        load_task(DatasetDict(part=Dataset.from_dict({"text": ["a"], "label": [0]})))


# --- columns ---------------------------------------------------------------------------------------------------------


def loaded(content: dict[str, Any], **options: Any) -> Any:
    rows = Dataset.from_dict(content)
    return load_task(DatasetDict(train=rows, validation=rows), **options)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("id_", "text"), ("text",)),
        (("title", "review"), ("review",)),
        (("hypothesis", "premise"), ("premise", "hypothesis")),
        (("question", "sentence"), ("question", "sentence")),
        (("Sentence1", "Sentence2", "genre"), ("Sentence1", "Sentence2")),
        (("whatever",), ("whatever",)),
    ],
)
def test_text_columns_by_name(columns: tuple[str, ...], found: tuple[str, ...]) -> None:
    content = {name: ["a", "b"] for name in columns}
    assert loaded({**content, "label": [0, 1]}).text_columns == found


def test_named_columns() -> None:
    content = {"one": ["a", "b"], "two": ["c", "d"], "mark": ["x", "y"], "label": [0, 1]}
    task = loaded(content, text="two, one", label="mark", metric="matthews")
    assert (task.text_columns, task.label_column, task.label_names) == (("two", "one"), "mark", ("x", "y"))
    assert (task.metric, task.metrics) == ("matthews", ("matthews", "accuracy", "f1"))
    assert loaded(content, text=["one"]).text_columns == ("one",)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"text": ["a", "b"], "other": [0, 1]}, {}, r"columns found: text, other\): name it with label="),
        ({"n": [1, 2], "label": [0, 1]}, {}, r"columns found: n, label\): name it with text="),
        ({"p": ["a", "b"], "q": ["a", "b"], "label": [0, 1]}, {}, "several columns.*text="),
        ({"text": ["a", "b"], "label": [0, 1]}, {"text": "txt"}, "no column 'txt'.*--text"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"label": "lab"}, "no column 'lab'.*--label"),
        ({"text": ["a", "b"], "n": [1, 2], "label": [0, 1]}, {"text": "n"}, "'n' holds no text"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"text": ["a", "b", "c"]}, "not 3"),
        ({"text": ["a", None], "label": [0, 1]}, {}, "empty in row 2"),
        ({"text": ["a", "b"], "label": [0.5, float("nan")]}, {}, "row 2"),
        ({"text": ["a", "b"], "label": ["x", None]}, {}, "row 2"),
        ({"text": ["a", "b"], "label": ["", "x"]}, {}, "row 1"),
        ({"text": ["a", "b"], "label": [[0], [1]]}, {}, "list"),
        ({"text": ["a", "b"], "label": [1, 1]}, {}, "same label"),
        ({"text": ["t"] * 60, "label": list(range(60))}, {}, "no classes"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"metric": "pearson"}, "use accuracy or f1 or matthews"),
        ({"text": ["a", "b"], "label": [0.1, 1.0]}, {"metric": "f1"}, "use spearman or pearson"),
    ],
)
def test_column_mistakes(content: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        loaded(content, **options)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_kinds_of_labels() -> None:
    texts = ["a", "b", "c"]
    strings = loaded({"text": texts, "label": ["pos", "neg", "pos"]})
    assert (list(strings.train["label"]), strings.label_names) == ([1, 0, 1], ("neg", "pos"))
    ids = loaded({"text": texts, "label": [0, 2, 1]})
    assert (list(ids.train["label"]), ids.label_names, ids.num_labels) == ([0, 2, 1], None, 3)
    stars = loaded({"text": texts, "stars": [5, 1, 3]})
    assert (list(stars.train["stars"]), stars.label_names) == ([2, 0, 1], ("1", "3", "5"))
    truth = loaded({"text": texts, "label": [True, False, True]})
    assert list(truth.train["label"]) == [1, 0, 1]
    numbers = loaded({"text": texts, "rating": [0.0, 2.0, 1.0]})
    assert (numbers.kind, numbers.metric) == ("regression", "spearman")
    named = Dataset.from_dict(
        {"text": texts, "label": [1, 0, 1]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])}),
    )
    assert load_task(DatasetDict(train=named, validation=named)).label_names == ("no", "yes")


@pytest.mark.parametrize("label", [["x", "z"], [0, 2]])
def test_unseen_class(label: list[Any]) -> None:
    known = ["x", "y"] if isinstance(label[0], str) else [0, 1]
    data = DatasetDict(
        train=Dataset.from_dict({"text": ["a", "b"], "label": known}),
        validation=Dataset.from_dict({"text": ["a", "b"], "label": label}),
    )
    with pytest.raises(InvalidData, match=rf"validation\) has the label {label[1]!r}"):
        load_task(data)


def test_labels_of_two_types() -> None:
    data = DatasetDict(
        train=Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]}),
        validation=Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}),
    )
    with pytest.raises(InvalidData, match="mix names and numbers"):
        load_task(data)


def test_check_labels_by_name() -> None:
    task = loaded({"text": ["a", "b", "c"], "label": ["bad", "good", "bad"]})
    model = tiny_text.model()
    assert check_labels(task, model) is task  # LABEL_0, LABEL_1: by count
    model.config.id2label = {0: "Bad", 1: "GOOD"}
    assert check_labels(task, model) is task
    model.config.id2label = {0: "good", 1: "bad"}
    turned = check_labels(task, model)
    assert (list(turned.train["label"]), turned.label_names) == ([1, 0, 1], ("good", "bad"))
    assert check_labels(turned, model) is turned
    model.config.id2label = {0: "yes", 1: "no"}
    with pytest.raises(InvalidData, match=r"\(bad, good\).*\(yes, no\)"):
        check_labels(task, model)


def test_check_labels_by_count() -> None:
    classes = loaded({"text": ["a", "b"], "label": [0, 1]})
    numbers = loaded({"text": ["a", "b"], "label": [0.0, 1.5]})
    with pytest.raises(InvalidData, match="has 2 labels .unnamed. but the model has 3"):
        check_labels(classes, tiny_text.model(num_labels=3))
    with pytest.raises(InvalidData, match=r"regression \(1 output\) but the model has 2"):
        check_labels(numbers, tiny_text.model())
    assert check_labels(numbers, tiny_text.model(num_labels=1)) is numbers


# --- splits ----------------------------------------------------------------------------------------------------------


def test_split_is_stratified_seeded_and_keeps_equal_texts_together() -> None:
    keys = [i // 2 for i in range(400)]  # every text twice
    strata = ["rare" if i < 80 else "common" for i in range(400)]
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    parts = split_rows(keys, strata, shares, seed=1)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 320, "validation": 40, "test": 40}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(400))
    for name, share in shares.items():
        assert sum(strata[row] == "rare" for row in parts[name]) == round(80 * share)
        assert all(row ^ 1 in parts[name] for row in parts[name])
    assert parts == split_rows(keys, strata, shares, seed=1) != split_rows(keys, strata, shares, seed=2)


def test_split_of_tiny_data() -> None:
    parts = split_rows(range(4), ["a", "a", "a", "b"], {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=0)
    assert [len(rows) for rows in parts.values()] == [2, 1, 1]
    assert 3 in parts["train"]
    with pytest.raises(InvalidData, match="too few"):
        split_rows([0, 0, 0], [0, 0, 0], {"train": 0.9, "validation": 0.1}, seed=0)


def test_missing_split_is_named() -> None:
    with pytest.raises(InvalidData, match="has no 'test' split; it has train, validation"):
        tiny_text.task().split("test")


# --- batches and fingerprint -----------------------------------------------------------------------------------------


def test_batches_keep_the_rows_and_use_few_lengths() -> None:
    task, words = tiny_text.task(), tiny_text.tokenizer()
    data = batches(task, "train", words, batch_size=7)
    assert [len(batch["labels"]) for batch in data] == [7, 7, 7, 7, 7, 5]
    assert {batch["input_ids"].shape[1] for batch in data} <= {16, 32}
    assert sorted(data.order) == list(range(40))
    texts, labels = list(task.train["text"]), list(task.train["label"])
    for at, row in enumerate(data.order):
        batch, i = data[at // 7], at % 7
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        assert ids == words(texts[row])["input_ids"]
        assert batch["input_ids"][i][~batch["attention_mask"][i].bool()].eq(0).all()
        assert int(batch["labels"][i]) == labels[row]


def test_batches_limit_shuffle_and_cut() -> None:
    task, words = tiny_text.task(), tiny_text.tokenizer()
    first = batches(task, "train", words, limit=10)
    assert sorted(first.order) == list(range(10))
    drawn = batches(task, "train", words, limit=10, shuffle=5, batch_size=4)
    assert drawn.order == batches(task, "train", words, limit=10, shuffle=5, batch_size=4).order
    assert sorted(drawn.order) != list(range(10))
    assert batches(task, "train", words, buckets=False).order == list(range(40))
    assert max(batch["input_ids"].shape[1] for batch in batches(task, "train", words, max_length=9)) == 9


def test_left_padding_and_pairs() -> None:
    rows = Dataset.from_dict({"text1": ["good", "bad film"], "text2": ["the", "a plot"], "label": [0.5, 1.0]})
    task = load_task(DatasetDict(validation=rows))
    words = tiny_text.tokenizer()
    words.padding_side = "left"
    batch = batches(task, "validation", words)[0]
    ids = words("good", "the")["input_ids"]
    assert batch["input_ids"][0].tolist() == [0] * (16 - len(ids)) + ids
    assert batch["labels"].dtype == torch.float32


def test_median_tokens() -> None:
    rows = Dataset.from_dict({"text": ["good", "bad bad", "the film is very good"], "label": [0, 1, 0]})
    assert median_tokens(load_task(DatasetDict(train=rows, validation=rows)), tiny_text.tokenizer()) == 4


def test_fingerprint_is_of_the_content() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    assert fingerprint(rows) == fingerprint(Dataset.from_dict({"label": [0, 1], "text": ["a", "b"]}))
    assert fingerprint(rows) != fingerprint(rows.select([1, 0]))
    assert fingerprint(DatasetDict(train=rows)) != fingerprint(DatasetDict(test=rows))
    written = b'["", ["label", "text"], 2][[0, 1], ["a", "b"]]'
    assert fingerprint(rows) == hashlib.sha256(written).hexdigest()[:16]
