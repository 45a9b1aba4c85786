"""Sampling with vLLM, which runs in separate processes, environments or hosts.

    python -m imm_jax.sampling.vllm --check --python=/path/to/venv/bin/python
    python -m imm_jax.sampling.vllm --check --urls=http://host:8000,http://other:8000

reports whether a usable vLLM is available, and its version.
"""

from imm_jax.sampling.vllm.sampler import VllmSampler

__all__ = ["VllmSampler"]
