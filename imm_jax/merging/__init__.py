"""Model merging: `from imm_jax import merging; merging.imm(base, start, tuned, ...)` on any pytree.

Every method under `methods/` is a function here, and needs jax and numpy alone. `checkpoint` merges HF checkpoints on
disk with the same bits. All functions share this:

- Trees hold arrays of any kind and must match in paths and shapes. Floating leaves are merged in float32 from what
  is stored and rounded once to the first tree's dtype; other leaves must be equal and are copied (of random states and
  counters of batches the first tree's). A leaf that stands in two places of every tree (tied weights) is merged once.
- `names` gives tensor names in a tree of the same form; a tuple names the tensors stacked on a leaf's axis
  `layer_axis`, so that stacked layers and single ones give the same bits. Without it the path of a leaf is its name.
- A setting is a number, a list that is interpolated over the layers, or a mapping from a regex of tensor names to
  either (the first match counts). `weights`, `densities` and the like take one setting for all models, or a sequence
  with one for each (so a list over layers stands in a second list). Numbers and lists may be jax arrays, traced ones
  too, so that weights can be learnt by gradient; what decides a mask (drop rates, densities) must be known.
- The result lies where the first tree lies, shard by shard. `donate=True` gives that tree's memory to the result.
- Functions run under jit, grad, vmap and eval_shape, on meshes of explicit and of automatic axes. Gradients to the
  models are exact; where entries are dropped by a draw or by magnitude, what was dropped counts as given. Inside
  jax.shard_map only methods run that look at single entries.
- What does not fit is a ValueError that names every path, or the value and what would be right.
"""

from typing import TYPE_CHECKING, Any

from imm_jax.merging import registry
from imm_jax.merging.masks import quantise_drop_rate
from imm_jax.merging.trees import default_names

if TYPE_CHECKING:

  def __getattr__(name: str) -> Any:
    """The methods, which stand in the registry alone."""

_functions = registry.load()
globals().update(_functions)

__all__ = ["default_names", "quantise_drop_rate", "registry", *sorted(_functions)]
