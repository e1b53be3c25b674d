"""What a server does when the load doubles, and when it is four times what the machine can do.

    python benchmarks/serving.py shared/models/minilm-l6-sst2
    python benchmarks/serving.py dialled --target-ms 50 --floor 0.88

Open loop: requests of a few SST-2 sentences come as a Poisson process, whether or not earlier ones are answered, and
a latency counts from the moment at which a request was due. `secateur serve` runs in a process of its own; this
process sends, over loopback, from the same cores, so that the server has less than the whole machine. A request that
is due while as many as allowed are under way is not sent, and counted.

First the capacity: a closed loop of eight clients on a server that does not turn its dial. Then three phases, at 0.4,
0.8 and 4 times of it. A row of results/serving.json is a second of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, setting, write
from plotly.subplots import make_subplots

from secateur.tasks import load_task

PHASES = {"base": 0.4, "doubled": 0.8, "overload": 4.0}
CLIENTS = 8


@dataclass
class Second:
    """What became of the requests that were due in one second."""

    latencies: list[float] = field(default_factory=list)  # milliseconds of those answered
    speedups: list[float] = field(default_factory=list)
    due: int = 0
    unsent: int = 0
    refused: int = 0
    memory: float = 0.0

    def row(self, phase: str, number: int) -> dict[str, Any]:
        cut = statistics.quantiles(self.latencies, n=20) if len(self.latencies) > 1 else []
        return {
            "phase": phase,
            "second": number,
            "due": self.due,
            "answered": len(self.latencies),
            "429": self.refused,
            "unsent": self.unsent,
            "p50 ms": round(cut[9], 1) if cut else None,
            "p95 ms": round(cut[18], 1) if cut else None,
            "speedup": round(statistics.mean(self.speedups), 2) if self.speedups else None,
            "rss MB": round(self.memory, 1),
        }


class Connections:
    """Requests over connections that stay open, no more of them than allowed."""

    def __init__(self, port: int, most: int) -> None:
        self.port, self.free = port, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        self.left = most

    async def post(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        while self.free and self.free[-1][0].at_eof():  # idle for too long
            self.free.pop()[1].close()
        reader, writer = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        found = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", found, re.IGNORECASE)
        answer = json.loads(await reader.readexactly(int(length[1]) if length else 0))
        self.free.append((reader, writer))
        return int(found.split()[1]), answer

    def close(self) -> None:
        for _, writer in self.free:
            writer.close()


@contextmanager
def server(arguments: list[str]) -> Iterator[tuple[int, int]]:
    """A server's port and process."""
    run = [sys.executable, "-c", "from secateur.cli import main; main()", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    print(line.strip())
    try:
        yield int(re.search(r"http://\S+:(\d+)", line)[1]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        print(process.communicate()[1].strip(), f"(exit code {process.returncode})")


async def capacity(port: int, bodies: list[bytes], seconds: float) -> float:
    """Requests per second of a closed loop; its first third warms up."""
    connections, source, counts = Connections(port, CLIENTS), random.Random(0), [0]
    start = time.perf_counter()

    async def client() -> None:
        while (now := time.perf_counter() - start) < seconds:
            await connections.post(source.choice(bodies))
            counts[0] += now > seconds / 3

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    connections.close()
    return counts[0] / (seconds * 2 / 3)


async def phase(port: int, pid: int, bodies: list[bytes], rate: float, seconds: int, most: int) -> list[Second]:
    """Requests that come at a rate, second by second."""
    connections, source, found = Connections(port, most), random.Random(1), [Second() for _ in range(seconds)]
    tasks, start, due = set[asyncio.Task[None]](), time.perf_counter(), 0.0

    async def ask(into: Second, due: float) -> None:
        status, answer = await connections.post(source.choice(bodies))
        connections.left += 1
        if status == 200:
            into.latencies.append(1e3 * (time.perf_counter() - start - due))
            into.speedups += [row["speedup"] for row in answer["predictions"]]
        else:
            into.refused += 1

    while (due := due + source.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        into = found[int(due)]
        if not into.due:
            into.memory = memory(pid)
        into.due += 1
        if connections.left:
            connections.left -= 1
            task = asyncio.create_task(ask(into, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            into.unsent += 1
    await asyncio.gather(*tasks)
    connections.close()
    return found


def memory(pid: int) -> float:
    """Resident megabytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def bodies_of(texts: int) -> list[bytes]:
    """Requests of so many sentences of SST-2 each."""
    rows = list(load_task("sst2").split("validation")["sentence"])
    return [json.dumps({"texts": rows[i : i + texts]}).encode() for i in range(0, len(rows) - texts + 1, texts)]


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each phase: sums, and medians over its seconds."""
    lines = ["| phase | due | answered | 429 | unsent | p50 ms | p95 ms | speed-up | RSS MB |", "|---" * 9 + "|"]
    for name in dict.fromkeys(row["phase"] for row in rows):
        those = [row for row in rows if row["phase"] == name]
        sums = [sum(row[key] for row in those) for key in ("due", "answered", "429", "unsent")]
        kept = {key: [r[key] for r in those if r[key] is not None] for key in ("p50 ms", "p95 ms", "speedup", "rss MB")}
        medians = [f"{statistics.median(values):.1f}" if values else "–" for values in kept.values()]
        lines.append(f"| {name} | {' | '.join(map(str, sums))} | {' | '.join(medians)} |")
    return "\n".join(lines)


def chart(record: dict[str, Any]) -> Any:
    """Latencies, and speed-up and metric of the answers, second by second."""
    rows, scores = record["rows"], record["metric"]
    seconds = list(range(len(rows)))
    found = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.06, specs=[[{}], [{"secondary_y": True}]])
    for name in ("p50 ms", "p95 ms"):
        found.add_scatter(x=seconds, y=[row[name] for row in rows], name=name, mode="lines", row=1, col=1)
    found.add_hline(
        y=record["target ms"], line_dash="dot", annotation_text="target", annotation_position="top left", row=1, col=1
    )
    speedups = [row["speedup"] for row in rows]
    steps = sorted((float(speedup), score) for speedup, score in scores.items())
    metric = [None if k is None else float(np.interp(k, *zip(*steps, strict=True))) for k in speedups]
    found.add_scatter(x=seconds, y=speedups, name="speed-up", mode="lines", row=2, col=1)
    found.add_scatter(x=seconds, y=metric, name="accuracy", mode="lines", row=2, col=1, secondary_y=True)
    for number, name in enumerate(PHASES):
        found.add_vline(x=number * len(rows) / len(PHASES), line_dash="dash", line_width=1)
        found.add_annotation(
            x=(number + 0.5) * len(rows) / len(PHASES), y=1.06, yref="paper", text=name, showarrow=False
        )
    found.update_layout(width=1000, height=520, template="plotly_white", margin=dict(l=60, r=60, t=40, b=40))
    found.update_yaxes(title_text="ms", row=1, col=1)
    found.update_yaxes(title_text="speed-up", row=2, col=1)
    found.update_yaxes(title_text="accuracy", tickformat=".3f", row=2, col=1, secondary_y=True)
    found.update_xaxes(title_text="seconds", row=2, col=1)
    return found


def scores_of(folder: Path) -> dict[str, float]:
    """Metric of each speed-up in the table of a folder's dial."""
    file = folder / "dial.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    return {str(row["speedup"]): next(iter(row["metrics"].values())) for row in rows if row.get("metrics")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with a dial or without")
    parser.add_argument("--target-ms", type=float)
    parser.add_argument("--floor", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=int, default=8, help="sentences in a request")
    parser.add_argument("--seconds", type=int, default=30, help="of each phase")
    parser.add_argument("--in-flight", type=int, default=256, help="requests under way at most")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving.json")
    parser.add_argument("--chart", type=Path, help="HTML of the kept result to write, and nothing else")
    args = parser.parse_args()
    if args.chart is not None:
        chart(json.loads(args.out.read_text())).write_html(args.chart, config={"displayModeBar": False})
        return
    bodies = bodies_of(args.texts)
    fixed = [str(args.folder), "--threads", str(args.threads)]
    turned = [
        str(part)
        for name in ("target_ms", "floor")
        if (value := getattr(args, name)) is not None
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    with server(fixed) as (port, _):
        most = asyncio.run(capacity(port, bodies, max(3, args.seconds / 3)))
    print(f"capacity: {most:.0f} requests of {args.texts} sentences per second")
    asked = {"texts": args.texts, "target ms": args.target_ms, "floor": args.floor, "serving threads": args.threads}
    record = {**setting(), **asked, "capacity": round(most, 1), "in flight": args.in_flight}
    record |= {"generator": "on the same cores", "metric": scores_of(args.folder), "rows": []}
    with server(fixed + turned) as (port, pid):
        for name, share in PHASES.items():
            found = asyncio.run(phase(port, pid, bodies, share * most, args.seconds, args.in_flight))
            record["rows"] += [second.row(name, number) for number, second in enumerate(found)]
    write(args.out, record)
    print(summary(record["rows"]))
    print("the generator shared the server's cores")


if __name__ == "__main__":
    main()
