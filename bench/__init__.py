"""Measurements: programs that take turns on one machine, and how each figure is made."""
