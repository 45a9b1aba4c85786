"""The Python API: what `import imm_jax` offers, over the modules that the commands use."""
