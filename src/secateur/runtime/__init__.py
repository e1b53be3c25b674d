"""Fast inference of compressed models: a native engine for encoders, and sparse kernels chosen by measuring them."""

from secateur.runtime.binding import Precision
from secateur.runtime.choice import Choice, choose_kernels
from secateur.runtime.engine import Engine, load

__all__ = ["Choice", "Engine", "Precision", "choose_kernels", "load"]
