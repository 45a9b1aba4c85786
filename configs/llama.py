"""IMM on Llama: llama2-7b (default) or llama3-8b; task gsm8k (default) or math.

    python -m imm_jax.main --config=configs/llama.py:llama3-8b,task=math --workdir=runs/llama

Both are gated on the hub: accept the license there and `hf auth login`, or give --config.model=DIR.
"""

import ml_collections

from configs import arguments, reasoning

MODELS = {"llama2-7b": "meta-llama/Llama-2-7b-hf", "llama3-8b": "meta-llama/Meta-Llama-3-8B"}


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
  given = arguments.parse(argument, size=tuple(MODELS), task=("gsm8k", "math"))
  return reasoning.get_config(model=MODELS[given["size"]], task=given["task"])
