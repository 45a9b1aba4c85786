"""One file a merging method: what it computes, where it is published, its options, an example.

A file that is put here is found, and its method is a function of `imm_jax.merging`, a `--method` of the command with
its flags, and a `merge_method` of recipes. `docs/merging.md` shows one.
"""

from imm_jax.merging.registry import METHODS

__all__ = ["METHODS"]
