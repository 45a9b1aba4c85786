"""The merging methods, one file each, with equation, publication, options and an example.

Files in this folder are discovered automatically; each method becomes a function of `imm_jax.merging`, a `--method` of
the command with its flags, and a `merge_method` of recipes. `docs/merging.md` shows how to write one.
"""
