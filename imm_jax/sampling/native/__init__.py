"""The native sampler: this package's decoder on the training devices."""

from imm_jax.sampling.native.sampler import NativeSampler

__all__ = ["NativeSampler"]
