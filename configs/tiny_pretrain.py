"""The recipe of the embedded base model: `python -m imm_jax.pretrain --config=configs/tiny_pretrain.py`."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.examples = 100_000  # one pass; about 45 tokens each
  # Shares of the families. The in-domain one (stories) is rare, so that there is room to gain.
  config.mixture = ml_collections.ConfigDict({
      "stories": 0.0145, "groups": 0.175, "compare": 0.15, "price": 0.15, "sequence": 0.14, "choice": 0.2,
      "drill": 0.17})
  config.global_batch = 40  # examples of a step
  config.row_length = 128  # tokens of a packed row
  config.learning_rate = 2e-3  # peak; linear decay to 0, so that averaging gains nothing by itself
  config.warmup_ratio = 0.02
  config.weight_decay = 0.01
  config.grad_clip = 1.0
  config.compute_dtype = "float32"
  config.eval_questions = 200  # test questions of a family, for the record
  config.model = ml_collections.ConfigDict({
      "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
      "num_key_value_heads": 2, "max_position_embeddings": 256})
  return config
