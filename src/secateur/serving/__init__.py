"""Serving an engine over HTTP: ragged batches, a latency dial that follows the load, and a queue with an end."""

from secateur.serving.app import make_app
from secateur.serving.cluster import deployment
from secateur.serving.server import serve
from secateur.serving.service import Service, Settings

__all__ = ["Service", "Settings", "deployment", "make_app", "serve"]
