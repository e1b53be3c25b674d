"""Weights of one bit and activations of few: quantisers, modules that use them, and products on packed words."""
