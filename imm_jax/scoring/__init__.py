"""Log-likelihoods of options after questions, and of texts."""

from imm_jax.scoring.likelihood import Score, Scorer
from imm_jax.scoring.requests import Request, encode_continuations, encode_text

__all__ = ["Request", "Score", "Scorer", "encode_continuations", "encode_text"]
