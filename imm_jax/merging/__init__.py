"""Model merging: `from imm_jax import merging; merging.imm(base, start, tuned, ...)` on any pytree.

The pytree functions need jax and numpy alone. `checkpoint` merges HF checkpoints on disk with the same bits.
"""

from imm_jax.merging.masks import quantise_drop_rate
from imm_jax.merging.pytree import dare, iimm, imm, linear, model_stock, slerp
from imm_jax.merging.task_vectors import breadcrumbs, dare_linear, dare_ties, della, task_arithmetic, ties
from imm_jax.merging.trees import default_names

__all__ = ["breadcrumbs", "dare", "dare_linear", "dare_ties", "default_names", "della", "iimm", "imm", "linear",
           "model_stock", "quantise_drop_rate", "slerp", "task_arithmetic", "ties"]
