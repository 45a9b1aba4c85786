"""`python -m imm_jax.sampling.vllm --check`."""

from absl import flags

from imm_jax import cli
from imm_jax.sampling.vllm import check

if __name__ == "__main__":
  flags.adopt_module_key_flags(check)
  cli.run(check.main)
