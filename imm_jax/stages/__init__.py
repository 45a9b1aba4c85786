"""What each stage of a round does: synthesize, select, fine-tune, merge, evaluate.

Stages read files of the run directory and write files of the run directory; nothing else passes between them.
"""
