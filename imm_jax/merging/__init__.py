"""Model merging on any pytree: `from imm_jax import merging; merging.imm(base, start, tuned, ...)`."""

from imm_jax.merging.pytree import dare, default_names, iimm, imm, quantise_drop_rate

__all__ = ["dare", "default_names", "iimm", "imm", "quantise_drop_rate"]
