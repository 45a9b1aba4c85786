"""Model merging: `from imm_jax import merging; merging.imm(base, start, tuned, ...)` on any pytree.

Every method under `methods/` is a function here, and needs jax and numpy alone. `on_disk` merges HF checkpoints on disk
with the same bits. All functions share this:

- Trees hold arrays of any kind and must match in paths and shapes. Floating leaves are merged in float32 from the
  stored values (float64 ones too, whose last bits and values above 3.4e38 are lost) and rounded once to the first
  tree's dtype; other leaves must be equal and are copied (random states and batch counters may differ; the first
  tree's are taken). A leaf shared between two paths of every tree (tied weights) is merged once, unless their options
  differ.
- `names` is a tree of tensor names of the same structure; a tuple names the tensors stacked along a leaf's axis
  `layer_axis`, so that stacked and separate layers give the same bits. By default a leaf's path is its name, and the
  leaf is one tensor: methods that look at whole tensors (angles, largest entries) need `names` for stacked layers.
- A setting is a number, a list that is interpolated over the layers, or a mapping from a regex of tensor names to
  either (the first match counts). `weights`, `densities` and the like take one setting for all models, or a sequence
  with one for each (so a list over layers is nested in another list). Numbers and lists may be jax arrays, also traced
  ones, so that weights can be learned by gradient; settings that decide a mask (drop rates, densities) must be
  concrete.
- The result has the sharding of the first tree. `donate=True` donates that tree's buffers to the result.
- Functions run under jit, grad, vmap and eval_shape, on meshes of explicit and of automatic axes. Gradients to the
  models are exact; masks, whether random or by magnitude, are treated as constants. Inside jax.shard_map only
  elementwise methods run.
- Invalid arguments raise a ValueError that names every mismatched path, or the value and the expected range.
"""

from imm_jax.merging import registry
from imm_jax.merging.masks import quantize_drop_rate
from imm_jax.merging.trees import default_names

_functions = registry.load()  # __init__.pyi has their signatures for type checkers
globals().update(_functions)

__all__ = ["default_names", "quantize_drop_rate", "registry", *sorted(_functions)]
