"""The native sampler: this package's decoder, on the devices that train."""

from imm_jax.sampling.native.sampler import NativeSampler

__all__ = ["NativeSampler"]
