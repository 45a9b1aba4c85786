"""The paper's settings for GSM8K and MATH (section 5.1, appendix A); what is ours says so."""

import ml_collections

from configs import common

HEADER = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.")
OOD = ("mawps", "sat_math")


def get_config(*, model: str, task: str) -> ml_collections.ConfigDict:
  """Returns the settings of IMM on a model with the in-domain task `gsm8k` or `math`."""
  config = common.get_config()
  config.model = model
  config.task.name = task
  config.task.ood = OOD
  config.task.questions_per_round = 0  # every train question, in every round
  config.task.eval_questions = 0
  config.prompt.header = HEADER
  config.sample.num_samples = {"gsm8k": 3, "math": 6}[task]
  config.sample.batch_size = 256
  config.sampler.kind = "vllm"  # without it: --config.sampler.kind=native
  config.sft.row_length = 2048
  config.eval.batch_size = 256
  config.merge.auto.general = ("mathqa",)  # ours: its train split
  if task == "math":  # its solutions are longer: ours
    config.sample.max_new_tokens = config.eval.max_new_tokens = 1024
  return config
