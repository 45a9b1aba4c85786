"""The Python API that `import imm_jax` offers; it calls the modules that the commands use, too."""
