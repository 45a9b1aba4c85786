"""Estimates of a run's time, memory and disk space, made before it begins or goes on."""
