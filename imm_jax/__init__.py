"""Iterative Model Merging (IMM): language models that improve their own reasoning without going shallow."""

__version__ = "0.1.0"
