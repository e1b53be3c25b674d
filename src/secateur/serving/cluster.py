"""Replicas of a service on a Ray cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.serving.app import make_app
from secateur.serving.refusals import extra
from secateur.serving.service import Service, Settings

ONGOING = 1000
"""Requests that a replica holds at a time; its queue says when they are too many."""


def deployment(folder: str | Path, settings: Settings | None = None, *, replicas: int = 1, **options: Any) -> Any:
    """An application of Ray Serve: replicas of an engine, each with a queue, batches and a dial of its own.

        from ray import serve
        serve.run(deployment("smaller", Settings(threads=2), replicas=4))

    Args:
        folder: of a model, at the same path on every machine of the cluster.
        settings: see there; `threads` is the number of processors that each replica takes, 1 if None.
        replicas: how many there are.
        options: of `ray.serve.deployment`, such as `autoscaling_config`.

    Returns:
        What `ray.serve.run` takes; the routes are those of `make_app`.

    Raises:
        MissingExtra: Ray Serve is not installed.
    """
    ray = extra("ray.serve", "ray")
    chosen = replace(settings or Settings(), threads=(settings or Settings()).threads or 1)
    place = Path(folder).resolve() if Path(folder).exists() else folder

    def build() -> Any:
        return make_app(Service.open(place, chosen))

    given = {
        "name": "secateur",
        "num_replicas": replicas,
        "max_ongoing_requests": ONGOING,
        "ray_actor_options": {"num_cpus": chosen.threads},
    }
    return ray.deployment(**given | options)(ray.ingress(build)()).bind()
