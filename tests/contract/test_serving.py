"""Contract of serving: the engine's answers over HTTP, refusals in one line, and nothing lost at the end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification
from typer.testing import CliRunner

import secateur.api
from secateur.cli import app as commands
from secateur.edits.tokens import dial_of
from secateur.errors import MissingExtra, SecateurError
from secateur.runtime import Engine, load
from secateur.serving import Service, Settings, app, deployment, make_app, serve
from secateur.serving.controller import Row
from secateur.serving.refusals import Refused
from secateur.serving.server import bound
from tests.contract.test_engine import alone, wide_model
from tests.contract.test_engine_tokens import dialled
from tests.contract.test_methods import tiny_tokenizer
from tests.unit import tiny_text

httpx = pytest.importorskip("httpx")
Client = pytest.importorskip("fastapi.testclient").TestClient
TIMEOUT = 60
TEXTS = ["the film is good", ["the plot", "was awful"], "so bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("serving") / "model"
    tiny_text.model(id2label={0: "bad", 1: "good"}).save_pretrained(made)
    tiny_text.tokenizer().save_pretrained(made)
    return made


class Gated:
    """An engine that computes when it is let, and has a dial."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.go, self.begun = engine, threading.Event(), threading.Semaphore(0)
        self.speedup, self.speedups = 1.0, list[float]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def encoded(self, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
        self.speedups.append(self.speedup)
        self.begun.release()
        assert self.go.wait(TIMEOUT)
        return self._engine.encoded(ids, lengths, types)


@pytest.fixture
def gated(folder: Path) -> Iterator[Gated]:
    made = Gated(load(folder, "fp32", threads=1))
    yield made
    made.go.set()


def service(engine: Any, folder: Path, dial: list[Row] | None = None, **settings: Any) -> Service:
    return Service(engine, AutoConfig.from_pretrained(folder), Settings(**settings), dial or [Row(1, 1)])


def test_answers_are_the_engines(folder: Path) -> None:
    with Client(make_app(Service.open(folder, Settings(precision="fp32", threads=1)))) as client:
        found = client.post("/predict", json={"texts": TEXTS}).json()
        texts: Any = [tuple(text) if isinstance(text, list) else text for text in TEXTS]
        wanted = load(folder, "fp32", threads=1)(texts)
        assert len(found["predictions"]) == 3
        for row, logits in zip(found["predictions"], wanted, strict=True):
            assert row["logits"] == pytest.approx(logits.tolist(), abs=1e-5)
            scores = dict(zip(("bad", "good"), logits.softmax(0).tolist(), strict=True))
            assert row["scores"] == pytest.approx(scores, abs=1e-5)
            assert row["label"] == max(scores, key=scores.__getitem__)
            assert row["speedup"] == 1
        assert found["queued_ms"] >= 0
        assert found["computed_ms"] > 0
        ids = tiny_text.tokenizer()(texts)["input_ids"]
        again = client.post("/predict", json={"ids": ids}).json()["predictions"]
        assert [row["logits"] for row in again] == [pytest.approx(row["logits"]) for row in found["predictions"]]
        assert client.get("/health").json()["status"] == "ready"
        shown = client.get("/metrics").text
        assert 'secateur_requests_total{status="200"} 2' in shown
        assert f"secateur_tokens_total {2 * sum(map(len, ids))}" in shown
        assert "requestBody" in client.get("/openapi.json").json()["paths"]["/predict"]["post"]


def test_a_text_may_name_the_padding(folder: Path) -> None:
    texts = ["the film is good", "he wrote [PAD] here"]
    with Client(make_app(Service.open(folder, Settings(precision="fp32", threads=1)))) as client:
        found = client.post("/predict", json={"texts": texts}).json()["predictions"]
    wanted = load(folder, "fp32", threads=1)(texts)
    assert [row["logits"] for row in found] == [pytest.approx(row.tolist(), abs=1e-5) for row in wanted]


@pytest.mark.parametrize("failure", [RuntimeError("out of luck"), float("nan")], ids=["raises", "not a number"])
def test_failures_are_answered_and_counted(folder: Path, failure: Any) -> None:
    engine = load(folder, "fp32", threads=1)

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def encoded(self, *given: Any) -> Tensor:
            if isinstance(failure, Exception):
                raise failure
            return engine.encoded(*given) * failure

    with Client(make_app(service(Failing(), folder)), raise_server_exceptions=False) as client:
        found = client.post("/predict", json={"texts": TEXTS})
        assert (found.status_code, found.json()) == (500, {"error": "The engine failed: its log says how."})
        assert 'secateur_requests_total{status="500"} 1' in client.get("/metrics").text
        assert client.get("/nothing").json() == {"error": "Not Found: GET /nothing"}
        assert client.get("/predict").json() == {"error": "Method Not Allowed: GET /predict"}


def test_answers_are_not_held_back() -> None:
    """Nagle's algorithm is off at the connections that a server takes."""

    async def run() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def taken(_: Any, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(taken, sock=bound("127.0.0.1", 0)) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.close()
            return await asyncio.wait_for(found, TIMEOUT)

    assert asyncio.run(run()) != 0


def test_regressors_and_classifiers_of_tokens(tmp_path: Path) -> None:
    tiny_text.tokenizer().save_pretrained(tmp_path)
    tiny_text.model(num_labels=1).save_pretrained(tmp_path)
    with Client(make_app(Service.open(tmp_path))) as client:
        (found,) = client.post("/predict", json={"texts": ["so good"]}).json()["predictions"]
    assert found["value"] == found["logits"][0]
    AutoModelForTokenClassification.from_config(tiny_text.model(num_labels=3).config).save_pretrained(tmp_path)
    with Client(make_app(Service.open(tmp_path))) as client:
        found = client.post("/predict", json={"ids": [[2, 4, 3], [2, 3]]}).json()["predictions"]
    assert [[token["id"] for token in row["tokens"]] for row in found] == [[2, 4, 3], [2, 3]]
    assert len(found[0]["tokens"][0]["scores"]) == 3


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        (b"{", 422, "no JSON"),
        (json.dumps({"texts": [5]}).encode(), 422, "texts, or pairs of them"),
        (json.dumps({"ids": [[99]]}).encode(), 422, "ids go from 0 to 19"),
        (json.dumps({"ids": [[5]] * 257}).encode(), 413, "257 examples are too many"),
        (b" " * (app.BODY + 1), 413, "The body is too large: send 1024 KiB at most"),
    ],
)
def test_bad_requests_hurt_nobody_else(given: bytes, status: int, message: str, folder: Path) -> None:
    with Client(make_app(Service.open(folder))) as client:
        found = client.post("/predict", content=given)
        assert (found.status_code, found.headers.get("Retry-After")) == (status, None)
        assert re.search(message, found.json()["error"])
        assert "\n" not in found.json()["error"]
        assert client.post("/predict", json={"texts": TEXTS}).status_code == 200
        assert f'secateur_requests_total{{status="{status}"}} 1' in client.get("/metrics").text


def test_overload_is_refused_with_a_time(folder: Path, gated: Gated) -> None:
    made = service(gated, folder, queue_tokens=10)
    with Client(make_app(made)) as client, ThreadPoolExecutor(2) as pool:
        under_way = pool.submit(client.post, "/predict", json={"ids": [[5]]})
        assert gated.begun.acquire(timeout=TIMEOUT)
        waiting = pool.submit(client.post, "/predict", json={"ids": [[5] * 9]})
        wait_until(lambda: made.batcher.waiting == 9)
        refused = client.post("/predict", json={"ids": [[5, 6]]})
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json() == {"error": "The queue is full (9 tokens)."}
        assert client.post("/predict", json={"ids": [[5] * 11]}).status_code == 413
        assert "secateur_queue_tokens 9\n" in client.get("/metrics").text
        assert "secateur_rejected_total 1\n" in client.get("/metrics").text
        gated.go.set()
        assert under_way.result(TIMEOUT).status_code == waiting.result(TIMEOUT).status_code == 200


def test_the_dial_follows_the_load(folder: Path, gated: Gated) -> None:
    """A millisecond for each token: 9 tokens take longer than 5 ms at the first row, and not at the second."""
    made = service(gated, folder, [Row(1, 1), Row(2.5, 2)], target_ms=5.0, max_wait_ms=1000.0)
    made.batcher.clock = lambda: 0.0
    made.batcher.controller.computed(1000, 1.0)
    with Client(make_app(made)) as client, ThreadPoolExecutor(2) as pool:
        under_way = pool.submit(client.post, "/predict", json={"ids": [[5]]})
        assert gated.begun.acquire(timeout=TIMEOUT)
        waiting = pool.submit(client.post, "/predict", json={"ids": [[5] * 9]})
        wait_until(lambda: made.batcher.waiting == 9)
        gated.go.set()
        found = [each.result(TIMEOUT).json()["predictions"][0]["speedup"] for each in (under_way, waiting)]
        assert found == gated.speedups == [1.0, 2.5]
        assert client.get("/health").json()["speedup"] == 2.5
        assert "secateur_speedup 2.5" in client.get("/metrics").text


def test_a_folder_with_a_dial(tmp_path: Path) -> None:
    """Opened at 2: there it stays without a target; with one the table decides, and the model's logits are answered."""
    model = dialled(wide_model(), tokens=32)
    dial_of(model).speedup = 2.0
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    row = {"ids": [list(range(5, 50))]}
    with Client(make_app(Service.open(tmp_path, Settings("fp32")))) as client:
        (found,) = client.post("/predict", json=row).json()["predictions"]
        assert found["speedup"] == client.get("/health").json()["speedup"] >= 2
    with pytest.raises(SecateurError, match="run `secateur dial"):
        Service.open(tmp_path, Settings(target_ms=50))
    secateur.api.dial(tmp_path, speedups=[1, 2], seconds=0.05)
    with Client(make_app(Service.open(tmp_path, Settings("fp32", target_ms=1e6)))) as client:
        assert client.get("/health").json()["speedups"] in ([1, 2], [1])  # without 2 if that was not measured faster
        (found,) = client.post("/predict", json=row).json()["predictions"]
        dial_of(model).speedup = 1.0
        assert found["logits"] == pytest.approx(alone(model, row["ids"])[0].tolist(), abs=1e-4)
        assert found["speedup"] == 1


def test_draining_answers_what_was_taken(folder: Path, gated: Gated) -> None:
    made = service(gated, folder)
    with Client(make_app(made)) as client, ThreadPoolExecutor(8) as pool:
        taken = [pool.submit(client.post, "/predict", json={"texts": TEXTS}) for _ in range(5)]
        wait_until(lambda: made.batcher.accepted == 5)
        made.batcher.drain()
        assert client.post("/predict", json={"texts": TEXTS}).status_code == 503
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        gated.go.set()
        assert [each.result(TIMEOUT).status_code for each in taken] == [200] * 5


def test_an_engine_that_fails_says_so(folder: Path, gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise SecateurError("There is not enough memory for this batch.")

    monkeypatch.setattr(gated, "encoded", fails)
    with Client(make_app(service(gated, folder))) as client:
        found = client.post("/predict", json={"texts": TEXTS})
        assert (found.status_code, found.json()) == (500, {"error": "There is not enough memory for this batch."})


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stalled:
        async def stream(self) -> AsyncIterator[bytes]:
            yield b'{"texts'
            await asyncio.Event().wait()

    monkeypatch.setattr(app, "READ", 0.01)
    with pytest.raises(Refused, match=r"did not come within 0.01 s") as error:
        asyncio.run(app._body(Stalled()))
    assert error.value.status == 408


def test_nobody_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where FastAPI would trace requests by itself, since somebody in the process does."""
    tracing = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    kept = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = tracing.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(kept))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    with Client(make_app(Service.open(folder))) as client:
        assert client.post("/predict", json={"texts": TEXTS}).status_code == 200
    assert kept.get_finished_spans() == ()


def wait_until(true: Callable[[], bool]) -> None:
    """Look again and again, for a minute at most."""
    tick = threading.Event()
    for _ in range(100 * TIMEOUT):
        if true():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


@pytest.fixture
def process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    run = "from secateur.cli import main; main()"
    arguments = [str(folder), "--port", "0", "--threads", "1", "--linger-ms", "20"]
    found = subprocess.Popen(
        [sys.executable, "-c", run, "serve", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    yield found
    found.kill()
    found.wait()


def test_a_process_that_is_ended_loses_nothing(process: subprocess.Popen[str]) -> None:
    """Eight clients ask without pause; SIGTERM comes in the middle: as many answers as requests that were accepted."""
    assert process.stderr is not None
    line = process.stderr.readline()
    address = re.search(r"http://\S+:\d+", line)
    assert address, line
    answers, enough = threading.Semaphore(0), 40

    def asks(_: int) -> int:
        count = 0
        with httpx.Client(base_url=address[0], timeout=TIMEOUT) as client:
            while True:
                try:
                    found = client.post("/predict", json={"texts": TEXTS})
                except httpx.TransportError:  # not listening any more
                    return count
                if found.status_code != 200:
                    assert found.status_code == 503
                    return count
                assert len(found.json()["predictions"]) == 3
                count += 1
                answers.release()

    with ThreadPoolExecutor(8) as pool:
        counts = [pool.submit(asks, number) for number in range(8)]
        for _ in range(enough):
            assert answers.acquire(timeout=TIMEOUT)
        process.send_signal(signal.SIGTERM)
        total = sum(each.result(TIMEOUT) for each in counts)
    assert process.wait(TIMEOUT) == 0
    assert process.stderr.read() == f"secateur: ended: {total} requests accepted, {total} answered\n"
    assert total >= enough


def test_what_cannot_be_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    result = run.invoke(commands, ["serve", str(folder), "--target-ms", "50", "--floor", "0.9", "--port", "0"])
    assert f"'{folder}' has none: compress with 'late' first." in str(result.exception)
    result = run.invoke(commands, ["serve", str(folder), "--precision", "int3", "--port", "0"])
    assert "A precision is fp32, bf16, int8" in str(result.exception)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SecateurError, match=f"127.0.0.1:{port} cannot be listened at .*: take another --port"):
            serve(folder, port=port)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtra, match=r"install secateur\[serve\]"):
        serve(folder, port=0)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(MissingExtra, match=r"install secateur\[ray\]"):
        deployment(folder)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas_of_ray_serve(replicas: int, folder: Path) -> None:
    ray, ray_serve = pytest.importorskip("ray"), pytest.importorskip("ray.serve")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        ray_serve.run(deployment(folder, Settings(precision="fp32"), replicas=replicas))
        running = ray_serve.status().applications["default"].deployments["secateur"].replica_states
        assert running == {"RUNNING": replicas}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client, ThreadPoolExecutor(4) as pool:
            found = [pool.submit(client.post, "/predict", json={"texts": [text]}) for text in TEXTS for _ in range(5)]
            labels = [each.result(120).json()["predictions"][0]["label"] for each in found]
            assert client.post("/predict", content=b"{").status_code == 422
            assert client.get("/health").json()["threads"] == 1
            if replicas == 1:  # each counts its own
                assert 'secateur_requests_total{status="200"} 15' in client.get("/metrics").text
        texts: Any = [tuple(text) if isinstance(text, list) else text for text in TEXTS for _ in range(5)]
        assert labels == [("bad", "good")[i] for i in load(folder, "fp32")(texts).argmax(1)]
    finally:
        ray_serve.shutdown()
        ray.shutdown()
