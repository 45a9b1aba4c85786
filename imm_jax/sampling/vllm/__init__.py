"""Sampling with vLLM, which runs in processes, environments or hosts of its own.

    python -m imm_jax.sampling.vllm --check --python=/path/to/venv/bin/python
    python -m imm_jax.sampling.vllm --check --urls=http://host:8000,http://other:8000

says whether a usable vLLM is there, and which.
"""

from imm_jax.sampling.vllm.sampler import VllmSampler

__all__ = ["VllmSampler"]
