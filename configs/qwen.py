"""IMM on Qwen2.5-Instruct: 0.5b (default), 1.5b or 7b; task gsm8k (default) or math.

    python -m imm_jax.main --config=configs/qwen.py --workdir=runs/qwen
    python -m imm_jax.main --config=configs/qwen.py:1.5b,task=math --workdir=runs/math --config.merge.base_weight=0.4
    python -m imm_jax.main --config=configs/qwen.py:7b --workdir=runs/7b --config.task.source=file:DIR/gsm8k
"""

import ml_collections

from configs import arguments, reasoning

MODELS = {"0.5b": "Qwen/Qwen2.5-0.5B-Instruct", "1.5b": "Qwen/Qwen2.5-1.5B-Instruct", "7b": "Qwen/Qwen2.5-7B-Instruct"}


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
  given = arguments.parse(argument, size=tuple(MODELS), task=("gsm8k", "math"))
  return reasoning.get_config(model=MODELS[given["size"]], task=given["task"])
