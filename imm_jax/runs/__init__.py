"""Runs: their settings and models, directory, record, log, status and metrics."""
