"""Fast inference of compressed models: kernels that are chosen by measuring them here."""

from secateur.runtime.choice import Choice, choose_kernels

__all__ = ["Choice", "choose_kernels"]
