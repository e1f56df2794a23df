"""Chooses the codes of quantized weights by what a model does with them, and measures the damage (runs models)."""
