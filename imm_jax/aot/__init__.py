"""The ahead-of-time check: compiling for TPU slices that are not here."""
