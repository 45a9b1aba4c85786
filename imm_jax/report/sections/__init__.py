"""Sections of the report on one subject each, for a run and for several runs side by side."""
