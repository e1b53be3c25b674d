"""The command that serves a folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli.options import Model, use_threads


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's own are open.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    precision: Annotated[
        str | None, typer.Option(help="Of products: int8 (the default), bf16 or fp32; of a binary model 1bit.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a batch; all cores by default.")] = None,
    target_ms: Annotated[
        float | None,
        typer.Option(help="Turn the latency dial so that 95 % of the answers take no longer; else it stays as it is."),
    ] = None,
    floor: Annotated[
        float | None, typer.Option(help="Least metric, as in dial.json, that the dial may be turned to, such as 0.88.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch.")] = 1024,
    queue_tokens: Annotated[int, typer.Option(min=1, help="Tokens that may wait; what is beyond gets 429.")] = 32768,
    max_wait_ms: Annotated[
        float | None,
        typer.Option(min=0.0, help="Expected wait beyond which requests get 429; the target, or 1000, by default."),
    ] = None,
    linger_ms: Annotated[
        float, typer.Option(min=0.0, help="How long a batch that is not full waits for more requests.")
    ] = 0.0,
    max_examples: Annotated[int, typer.Option(min=1, help="Examples in a request.")] = 256,
) -> None:
    """Answer requests over HTTP by the native engine: POST /predict, GET /health, GET /metrics."""
    from secateur.serving import Settings
    from secateur.serving import serve as run

    use_threads(threads)
    given: dict[str, Any] = {"precision": precision, "threads": threads, "target_ms": target_ms, "floor": floor}
    given |= {"max_tokens": max_tokens, "queue_tokens": queue_tokens, "max_examples": max_examples}
    run(model, Settings(**given, max_wait_ms=max_wait_ms, linger_ms=linger_ms), host=host, port=port)
