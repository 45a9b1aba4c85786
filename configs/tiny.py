"""The embedded model on generated word problems: minutes on 2 cores.

    python -m imm_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.get_config()
  config.task.questions_per_round = 1000
  config.prompt.few_shot = 0  # the model was trained without examples
  config.sample.max_new_tokens = 40
  config.sample.batch_size = 250
  config.sample.compute_dtype = "float32"
  config.sft.learning_rate = 5.5e-4
  config.sft.global_batch = 20
  config.sft.row_length = 192
  config.sft.compute_dtype = "float32"
  config.merge.base_weight = 0.4  # the base is weak in domain and strong out of it
  config.eval.max_new_tokens = 40
  config.eval.batch_size = 200
  return config
