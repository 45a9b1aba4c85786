"""The embedded model on generated word problems: minutes on 2 cores.

    python -m imm_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.get_config()
  config.prompt.few_shot = 0  # the model was trained without examples
  config.sample.max_new_tokens = 40
  config.sample.batch_size = 250
  config.sample.compute_dtype = "float32"
  config.sft.learning_rate = 1e-3
  config.sft.global_batch = 20
  config.sft.row_length = 256
  config.sft.compute_dtype = "float32"
  config.eval.max_new_tokens = 40
  config.eval.batch_size = 200
  return config
