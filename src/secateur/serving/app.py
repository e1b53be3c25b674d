"""The HTTP face of a service: three routes of a FastAPI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from secateur.errors import InvalidData, SecateurError
from secateur.serving.metrics import CONTENT
from secateur.serving.refusals import Refused, extra
from secateur.serving.service import Service

LOG = logging.getLogger(__name__)
BODY = 1 << 20
"""Bytes of a request."""
READ = 10.0
"""Seconds that its body may take to come."""
SILENT = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""Telemetry of newer releases of FastAPI, which the environment could turn on; older ones take it as a note."""
TEXT: dict[str, Any] = {"type": "string"}
LIST = {
    "texts": {"oneOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 2}]},
    "ids": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
}
SCHEMA = {
    "oneOf": [
        {"type": "object", "required": [name], "properties": {name: {"type": "array", "items": items}}}
        for name, items in LIST.items()
    ]
}


def make_app(service: Service) -> Any:
    """A FastAPI application that answers by a service, and closes it at its end.

    Raises:
        MissingExtra: FastAPI is not installed.
    """
    fastapi = extra("fastapi", "serve")
    responses = extra("fastapi.responses", "serve")
    gone = extra("starlette.requests", "serve").ClientDisconnect

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        service.close()

    async def predict(request: Any) -> Any:
        status, headers = 500, None
        try:
            answer = responses.JSONResponse(await service.predict(await _body(request)))
            status = 200
            return answer
        except Refused as error:
            status, reason = error.status, str(error)
            headers = None if error.retry is None else {"Retry-After": str(error.retry)}
        except InvalidData as error:
            status, reason = 422, str(error)
        except gone:
            status, reason = 400, ""  # nobody is there to read it
        except Exception as error:
            LOG.exception("A request failed.")
            reason = str(error) if isinstance(error, SecateurError) else "The engine failed: its log says how."
        finally:
            service.metrics.request(status)
        return responses.JSONResponse({"error": reason}, status, headers)

    predict.__annotations__["request"] = fastapi.Request  # an optional package has no name to write there

    async def health() -> Any:
        found = service.health()
        return responses.JSONResponse(found, 200 if found["status"] == "ready" else 503)

    async def metrics() -> Any:
        return responses.Response(service.numbers(), media_type=CONTENT)

    async def other(request: Any, error: Any) -> Any:
        reason = f"{error.detail}: {request.method} {request.url.path}"
        return responses.JSONResponse({"error": reason}, error.status_code, error.headers)

    pages = {"docs_url": None, "redoc_url": None}  # which load scripts from elsewhere
    app = fastapi.FastAPI(title="secateur", lifespan=lifespan, telemetry=SILENT, **pages)
    body = {"required": True, "content": {"application/json": {"schema": SCHEMA}}}
    app.exception_handler(404)(other)
    app.exception_handler(405)(other)
    app.post("/predict", response_model=None, openapi_extra={"requestBody": body})(predict)
    app.get("/health", response_model=None)(health)
    app.get("/metrics", response_model=None)(metrics)
    return app


async def _body(request: Any) -> bytes:
    """The body of a request, read no further than allowed."""
    found = bytearray()
    try:
        async with asyncio.timeout(READ):
            async for part in request.stream():
                found += part
                if len(found) > BODY:
                    raise Refused(413, f"The body is too large: send {BODY // 1024} KiB at most.")
    except TimeoutError:
        raise Refused(408, f"The body did not come within {READ:g} s.") from None
    return bytes(found)
