"""A run: its settings and models, its directory, log, status and metrics; several runs as one experiment."""
