"""Contract of the native engine: the logits of the model in every tier and precision, whatever the lengths and cuts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.errors import InvalidData, InvalidModel, SecateurError, UnsupportedModel
from secateur.families import FAMILIES
from secateur.runtime import Precision, build, compiling, load
from secateur.runtime.binding import NativeEncoder
from secateur.runtime.encoder import TorchEncoder
from secateur.runtime.plan import FAMILIES as PLANNED
from secateur.runtime.plan import plan_of
from tests.conftest import tiny_model
from tests.contract.test_bypass import cut_out
from tests.contract.test_families import CUTS, cut
from tests.contract.test_methods import tiny_tokenizer

NATIVE = build.TIERS[: build.library().sec_best_tier() + 1]
TIERS = (*NATIVE, "torch")


def wide_model(seed: int = 0, **changes: Any) -> Any:
    """A BERT whose heads are as wide as real ones, with weights that make every unit matter."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=99, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=200)
    model = BertForSequenceClassification(BertConfig(**settings | {"num_labels": 3} | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.09)
    return model


def examples(lengths: list[int], seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 99, (length,), generator=source).tolist() for length in lengths]


@torch.no_grad()
def alone(model: Any, rows: list[list[int]]) -> Tensor:
    """What the model says of each row by itself, without padding."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def cut_model(family: str, how: str) -> Any:
    """A tiny model that is "dense", "bypassed", or sliced in one of the ways of `CUTS`."""
    model: Any = tiny_model(family)
    if how == "bypassed":
        return cut_out(model, cut(model, "layer without both"))
    if how != "dense":
        secateur.edits.apply_edits(model, [secateur.edits.Slice(cut(model, how))])
    return model


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", ["dense", "bypassed", *CUTS])
@pytest.mark.parametrize("family", PLANNED)
def test_every_family_and_cut(family: str, how: str, tier: str) -> None:
    model = cut_model(family, how)
    rows = examples([9, 1, 30, 4])
    with load(model, "fp32", tier=tier) as engine:
        assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-4
        assert engine.info()["tier"] == tier
        assert len(engine.info()["layers"]) == 3


@pytest.mark.parametrize("tier", NATIVE)
@pytest.mark.parametrize("how", ["dense", "bypassed", "layer without heads"])
@pytest.mark.parametrize("family", PLANNED)
def test_states_that_no_head_reads_end_behind_the_last_attention(family: str, how: str, tier: str) -> None:
    """First tokens have their last states; others have not, unless they are classified or averaged."""
    plan, starts = plan_of(cut_model(family, how)), torch.tensor([0, 9, 10, 40], dtype=torch.int32)
    ids = torch.tensor([i for row in examples([9, 1, 30]) for i in row])
    first = starts[:-1].long()
    wanted = TorchEncoder(plan).run(ids, starts, None, 1)
    others = torch.ones(len(ids), dtype=torch.bool).index_fill(0, first, False)
    found = []
    for head in (plan.head, replace(plan.head, mean=True), replace(plan.head, first=False)):
        encoder = NativeEncoder(replace(plan, head=head), "fp32", tier)
        found.append(encoder.run(ids, starts, None, 1))
        encoder.close()
    assert (found[0] - wanted)[others].abs().amax(dim=1).min() > 0.01
    assert (found[1] - wanted).abs().max() <= 1e-4
    assert torch.equal(found[2], found[1])
    assert torch.equal(found[0][first], found[1][first])


@pytest.mark.parametrize("tier", NATIVE)
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999999), ("bf16", 0.9999), ("int8", 0.999)])
@pytest.mark.parametrize("width", [32, 64, 24])
def test_precisions(tier: str, precision: Precision, least: float, width: int) -> None:
    """Heads of 32 and 64 entries go through tiles where there are some, others do not."""
    heads = 192 // width
    model = wide_model(hidden_size=192, num_attention_heads=heads)
    rows = examples([9, 1, 17, 64, 33, 2, 128])
    with load(model, precision, tier=tier) as engine:
        found, wanted = engine(rows), alone(model, rows)
    assert cosine(found, wanted) >= least
    assert (found - wanted).abs().max() <= {"fp32": 1e-4, "bf16": 0.05, "int8": 0.15}[precision] * wanted.abs().max()


@pytest.mark.parametrize("tier", NATIVE)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_all_lengths_and_batches(tier: str, precision: Precision) -> None:
    """1 to 512 tokens, and 1 to 64 examples: each as it is alone, in one thread and in two."""
    model = wide_model(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96)
    with load(model, precision, tier=tier, threads=1) as engine:
        for lengths in ([1], [512], [15, 16, 17], [31, 32, 33, 255, 256, 257], list(range(1, 65))):
            rows = examples(lengths)
            found = engine(rows)
            bound = 1e-4 if precision == "fp32" else 0.1
            assert (found - alone(model, rows)).abs().max() <= bound
            singly = torch.cat([engine([row]) for row in rows])
            assert (found - singly).abs().max() <= (1e-5 if precision == "fp32" else 0.05)
            engine.threads = 2
            assert torch.equal(engine(rows), found)
            engine.threads = 1


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
@pytest.mark.parametrize("tier", NATIVE)
def test_activations(tier: str, activation: str) -> None:
    model = wide_model(hidden_act=activation)
    rows = examples([5, 40])
    assert (load(model, "fp32", tier=tier)(rows) - alone(model, rows)).abs().max() <= 1e-4


@pytest.mark.parametrize("tier", TIERS)
def test_extreme_values(tier: str) -> None:
    """Large weights saturate exponentials and GELUs: no NaN, and the model's logits."""
    model = wide_model()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(30)
            layer.intermediate.dense.weight.mul_(30)
    rows = examples([3, 50])
    assert (load(model, "fp32", tier=tier)(rows) - alone(model, rows)).abs().max() <= 1e-3


@pytest.mark.parametrize("tier", TIERS)
def test_tokens_are_classified(tier: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(wide_model().config).eval()
    rows = examples([9, 1, 20])
    found = load(model, "fp32", tier=tier)(rows)
    assert [len(logits) for logits in found] == [9, 1, 20]
    for logits, row in zip(found, rows, strict=True):
        assert (logits - alone(model, [row])[0]).abs().max() <= 1e-4


def test_zeros_are_weights_like_any() -> None:
    model: Any = tiny_model("bert")
    for parameter in model.bert.encoder.parameters():
        if parameter.dim() > 1:
            with torch.no_grad():
                parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    secateur.sparsify(model)
    rows = examples([3, 20])
    assert (load(model, "fp32")(rows) - alone(model, rows)).abs().max() <= 1e-4


def test_texts_and_pairs(tmp_path: Path) -> None:
    """A folder reads its own tokenizer; the second text of a pair has the second token type."""
    model: Any = tiny_model("bert")
    words = tiny_tokenizer()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    texts: list[Any] = ["w1 w2 w3", ("w4", "w5 w6"), "w7"]
    with load(tmp_path, "fp32") as engine:
        found = engine(texts)
    for text, logits in zip(texts, found, strict=True):
        pair = (text,) if isinstance(text, str) else text
        inputs = words(*pair, return_tensors="pt")
        with torch.no_grad():
            assert (model(**inputs).logits[0] - logits).abs().max() <= 1e-4


@pytest.mark.parametrize("threads", [1, 3])
def test_several_threads_share_an_engine(threads: int) -> None:
    model = wide_model()
    engine = load(model, "int8", threads=threads)
    batches = [examples([5, 30, 7], seed) for seed in range(16)]
    wanted = [engine(batch) for batch in batches]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        found[number] = [engine(batch) for batch in batches]

    callers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(a, b) for results in found.values() for a, b in zip(results, wanted, strict=True))
    assert len(found) == 4


LISTS = 3 * (64 + 128 + 64 + 64 + 64 + 64 + 64 + 64)
"""Bytes of the lists of blocks of three layers of 128 entries and 256 neurons, in whole lines of 64 bytes: of queries,
keys and values 13 numbers and 24, of the output map 5 and 8, into the neurons 9 and 16, out of them 5 and 16."""


def test_int8_holds_a_byte_for_each_weight() -> None:
    model = wide_model(hidden_size=128, intermediate_size=256)
    weights = 3 * (4 * 128 * 128 + 2 * 128 * 256)
    sizes = {precision: load(model, precision).info()["bytes"] for precision in ("fp32", "bf16", "int8")}  # type: ignore[arg-type]
    outputs = 3 * (3 * 128 + 128 + 256 + 128)  # each has a bias, with int8 a scale and a sum besides
    assert sizes == {
        "fp32": 4 * weights + 4 * outputs + LISTS,
        "bf16": 2 * weights + 4 * outputs + LISTS,
        "int8": weights + 12 * outputs + LISTS,
    }


def test_a_closed_engine_is_closed() -> None:
    engine = load(wide_model())
    engine([[5, 6]])
    engine.close()
    engine.close()
    with pytest.raises(SecateurError, match="closed"):
        engine([[5, 6]])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux lists them")
@pytest.mark.parametrize("tier", NATIVE)
def test_threads_come_with_a_pass_and_leave_with_the_engine(tier: str) -> None:
    """One for each beside the caller's, kept for the next pass of as many; the same logits."""

    def there() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    rows, before = examples([9, 1, 33, 64]), there()
    with load(wide_model(), "fp32", tier=tier, threads=1) as engine:
        wanted = engine(rows)
        for threads, more in ((1, 0), (3, 2), (3, 2), (2, 1), (1, 1), (5, 4)):
            engine.threads = threads
            assert torch.equal(engine(rows), wanted)
            assert there() == before + more
    assert there() == before


def test_a_tier_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_TIER", "portable")
    assert load(wide_model()).info()["tier"] == "portable"
    monkeypatch.setenv("SECATEUR_TIER", "neon")
    with pytest.raises(SecateurError, match="A tier is portable, avx2, avx512, amx or torch"):
        load(wide_model())


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise build.CannotBuild("none")

    monkeypatch.setattr("secateur.runtime.binding.library", none)
    model, rows = wide_model(), examples([4, 9])
    with pytest.warns(UserWarning, match="Until then torch computes, in fp32"):
        engine = load(model, "int8")
    assert (engine.info()["tier"], engine.info()["precision"]) == ("torch", "fp32")
    assert (engine(rows) - alone(model, rows)).abs().max() <= 1e-4
    with pytest.raises(SecateurError, match="none"):
        load(model, tier="portable")


def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a compiler; without one what is in the cache will do, if nobody else may write there."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    calls: list[str] = []

    def compiled(compiler: str, folder: Path) -> Path:
        calls.append(compiler)
        (folder / "secateur.so").write_bytes(b"")
        return folder / "secateur.so"

    monkeypatch.setattr(compiling, "compiled", compiled)
    made = build.built()
    assert build.built() == made
    assert len(calls) == 1
    monkeypatch.setattr(compiling, "COMPILERS", ())
    monkeypatch.delenv("CXX", raising=False)
    assert build.built() == made
    made.parent.chmod(0o777)
    with pytest.raises(build.CannotBuild, match="could be written by others"):
        build.built()
    made.parent.chmod(0o700)
    made.unlink()
    with pytest.raises(build.CannotBuild, match="there is none: install one"):
        build.built()
    monkeypatch.setenv("CXX", "absent-compiler")
    with pytest.raises(build.CannotBuild, match="not there: 'absent-compiler'"):
        build.library()


def test_a_library_that_the_wheel_brought_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it was made of the sources beside it."""
    made = build.built()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "COMPILERS", ())
    monkeypatch.delenv("CXX", raising=False)
    shutil.copytree(compiling.SOURCES, tmp_path / "native", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(compiling, "SOURCES", tmp_path / "native")
    brought = shutil.copy(made, tmp_path / "native" / f"{compiling.stem()}.so")
    assert build.built() == brought
    model, rows = wide_model(), examples([4, 9])
    assert (load(model, "fp32", tier="portable")(rows) - alone(model, rows)).abs().max() <= 1e-4
    result = CliRunner().invoke(app, ["build-engine", "--json"])
    assert json.loads(result.stdout) == {"library": str(brought), "tier": NATIVE[-1]}
    with (tmp_path / "native" / "kernels.h").open("a") as source:
        source.write("// changed\n")
    with pytest.raises(build.CannotBuild, match="there is none: install one"):
        build.built()


def test_a_compiler_that_fails_is_quoted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    script, calls = tmp_path / "cc", tmp_path / "calls"
    script.write_text(f"#!/bin/sh\necho x >> {calls}\necho 'engine.cpp:1: error: no such machine' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    for _ in range(2):
        with pytest.raises(
            build.CannotBuild, match="cannot build the native engine: engine.cpp:1: error: no such machine"
        ):
            build.library()
    assert len(calls.read_text().split()) == 2  # its version, and a tier


def test_odd_widths_stay_within_their_rows() -> None:
    """Embeddings of 24 entries (ELECTRA's are narrower than its layers) and a hidden width of 36."""
    rows = examples([5, 1, 40])
    model: Any = tiny_model("electra", embedding_size=24)
    other = wide_model(hidden_size=36, num_attention_heads=2, intermediate_size=50)
    for tier in TIERS:
        for each in (model, other):
            assert (load(each, "fp32", tier=tier)(rows) - alone(each, rows)).abs().max() <= 1e-4


def test_an_engine_does_not_follow_its_model() -> None:
    model, rows = wide_model(), examples([5])
    engine = load(model)
    before = engine(rows)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(engine(rows), before)
    before += 1  # an ordinary tensor


def test_encoded_checks_what_it_is_given() -> None:
    engine = load(wide_model())
    ids = torch.arange(5, 25)
    wanted = engine([ids.tolist()])
    assert torch.equal(engine.encoded(ids.int(), torch.tensor([20])), wanted)
    assert torch.equal(engine.encoded(torch.arange(0, 50)[10:50:2] * 0 + ids, torch.tensor([20])), wanted)
    doubled = ids.repeat_interleave(2)
    assert torch.equal(engine.encoded(doubled[::2], torch.tensor([20], dtype=torch.int32)), wanted)
    for lengths, types in ([21], None), ([19], None), ([20], [0] * 19), ([], None):
        with pytest.raises(InvalidData, match="20 ids do not fit"):
            engine.encoded(ids, torch.tensor(lengths, dtype=torch.long), None if types is None else torch.tensor(types))
    for lengths in ([500, -480], [20, 0], [2**32 + 5, 15 - 2**32]):  # which add up
        with pytest.raises(InvalidData, match="An example has 1 to 512 tokens"):
            engine.encoded(ids, torch.tensor(lengths))
    with pytest.raises(InvalidData, match="whole numbers in one row"):
        engine.encoded(ids.float(), torch.tensor([20]))
    for count in (0, 1000, None):
        with pytest.raises(SecateurError, match="from 1 to 256"):
            engine.threads = count  # type: ignore[assignment]


def test_a_call_under_way_ends_when_the_engine_is_closed() -> None:
    """The head, too, runs before memory goes."""
    model, rows = wide_model(), examples([9, 30])
    engine = load(model, "fp32")
    wanted, run, closer = engine(rows), engine.encoder.run, threading.Thread(target=engine.close)

    def closing(*given: Any) -> Tensor:
        hidden = run(*given)
        closer.start()
        while engine.encoder._open:  # type: ignore[attr-defined]
            pass
        return hidden

    engine.encoder.run = closing  # type: ignore[method-assign]
    encoded = engine.encoded

    def closed_behind(*given: Any) -> Tensor:
        logits = encoded(*given)
        closer.join()
        return logits

    engine.encoded = closed_behind  # type: ignore[method-assign]
    assert torch.equal(engine(rows), wanted)
    engine.encoded = encoded  # type: ignore[method-assign]
    with pytest.raises(SecateurError, match="closed"):
        engine(rows)


def test_a_fork_beside_a_call_can_close() -> None:
    """The child does not wait for the call of a thread that it does not have."""
    code = """
import os, sys
from tests.contract.test_engine import examples, wide_model
from secateur.runtime import load
engine = load(wide_model(), "fp32", threads=2)
with engine.encoder.call():
    child = os.fork()
    if child == 0:
        engine(examples([9, 30]))
        engine.close()
        os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_fork_computes() -> None:
    """What a server that forks after loading does: threads of the first process are not there in the second."""
    code = """
import os, torch
from tests.contract.test_engine import examples, wide_model
from secateur.runtime import load
engine = load(wide_model(), threads=2)
wanted = engine(examples([40, 60]))
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(engine(examples([40, 60])), wanted) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_a_model_was_changed_by_is_not_left_out() -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = wide_model()
    model.bert.encoder.layer[0].output.dense = Adapted(200, 128)
    with pytest.raises(UnsupportedModel, match="not Adapted: merge adapters"):
        load(model)
    model = wide_model()
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[3, 4] = torch.nan
    with pytest.raises(InvalidModel, match=r"layer.1.intermediate.dense.weight has values that are NaN"):
        load(model)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "nothing to run"),
        ("a text", "put a text into brackets"),
        ({"input_ids": [[5, 6]]}, r"give tokenizer\(texts\)\['input_ids'\] without padding"),
        ([5, 6, 7], "all lists of token ids"),
        ([["a", "b", "c"]], "all lists of token ids"),
        (["a text", [5]], "all lists of token ids"),
        ([[5.5]], "all lists of token ids"),
        (["a text"], "need a tokenizer"),
        ([[5], []], "1 to 512 tokens"),
        ([[5] * 513], "1 to 512 tokens"),
        ([[5, 6, 0, 0]], r"Leave padding \(0\) out"),
        ([[5, 99]], "ids go from 0 to 98"),
        ([[-1]], "ids go from 0 to 98"),
    ],
)
@pytest.mark.parametrize("tier", ["portable", "torch"])
def test_bad_batches(batch: Any, message: str, tier: str) -> None:
    engine = load(wide_model(), tier=tier)
    with pytest.raises(InvalidData, match=message):
        engine(batch)
    with pytest.raises(InvalidData, match="types go from 0 to 1"):
        engine.encoded(torch.tensor([5, 6]), torch.tensor([2]), torch.tensor([0, 2]))


def test_what_cannot_be_run_is_refused() -> None:
    for family in sorted(set(FAMILIES) - set(PLANNED)):
        with pytest.raises(UnsupportedModel, match="The engine runs bert"):
            load(tiny_model(family))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="activations gelu"):
        load(wide_model(hidden_act="silu"))
    with pytest.raises(UnsupportedModel, match="classifiers of sequences and tokens, not BertModel"):
        load(wide_model().bert)
    with pytest.raises(SecateurError, match="A precision is fp32, bf16, int8"):
        load(wide_model(), "fp8")  # type: ignore[arg-type]


def test_engines_side_by_side(tmp_path: Path) -> None:
    """torch, the native engine and an ONNX file say the same; the first one's ratio is 1."""
    model = wide_model(max_position_embeddings=64)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = secateur.compare_engines(tmp_path, ["torch", "native", "onnx"], tokens=12, seconds=0.05)
    rows = found["engines"]
    names = [name.partition(" (")[0] for name in rows]
    assert names[0] == "torch float32"
    assert set(names) >= {"native fp32", "native bf16", "native int8", "onnx"}
    assert rows["torch float32"]["ratio"] == 1
    assert all(
        row["cosine"] > 0.999 and row["difference"] < 0.15 and row["latency_ms"]["n"] >= 10 for row in rows.values()
    )
    assert (found["batch"], found["tokens"]) == (1, 12)
    shown = CliRunner().invoke(
        app, ["measure", str(tmp_path), "--engine", "native", "--tokens", "9", "--seconds", "0.1"]
    )
    assert shown.exit_code == 0, shown.output
    assert len(shown.stdout.splitlines()) == 4
    for names, message in (((), "at least one engine"), (["tflite"], "not 'tflite'")):
        with pytest.raises(SecateurError, match=message):
            secateur.compare_engines(tmp_path, names)


@pytest.mark.parametrize("tier", NATIVE)
def test_int8_keeps_words_in_bytes(tier: str) -> None:
    """99 words of 128 bytes with a scale each; 512 positions and 2 types in float32."""
    model = wide_model()
    with torch.no_grad():  # rows that 8 bits hold exactly: the table changes no logits
        words = model.bert.embeddings.word_embeddings.weight
        words.copy_(torch.randint(-127, 128, words.shape, generator=torch.Generator().manual_seed(0)) / 256)
        words[:, 0] = 127 / 256
    rows = examples([9, 1, 30])
    with load(model, "int8", tier=tier) as engine:
        assert engine.info()["table_bytes"] == 99 * (128 + 4) + 4 * 128 * (512 + 2)
        assert torch.equal(engine.plan.words(torch.arange(99)), words.detach())
        wanted = alone(model, rows)
        assert (engine(rows) - wanted).abs().max() <= 0.15 * wanted.abs().max()
