"""The stages of a round: synthesize, select, fine-tune, merge, evaluate, and analyses.

Stages communicate only through files of the run directory.
"""
