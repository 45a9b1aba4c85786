"""How likely a model finds texts: of options after a question, and of prose."""

from imm_jax.scoring.likelihood import Score, Scorer
from imm_jax.scoring.requests import Request, encode_continuations, encode_text

__all__ = ["Request", "Score", "Scorer", "encode_continuations", "encode_text"]
