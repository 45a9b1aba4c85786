"""A small pretrained Llama, SmolLM2-135M-Instruct, on real one-step word problems: `quick` (default), `base`, `study`.

    python -m imm_jax.main --config=configs/smollm2.py --workdir=runs/smollm2

`quick` is one round from the model as it is published. `base` and `study` are what `benchmarks/smollm2.py` runs: a
short SFT on worked answers of other questions, and three rounds from what that gives.
"""

import ml_collections

from configs import arguments, common


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
  size = arguments.parse(argument, size=("quick", "base", "study"))["size"]
  config = common.get_config()
  config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
  config.task.name = "mawps_one_step"  # it solves some of them, and next to none that take two steps
  # SVAMP's questions are near, the others are general knowledge, scored by likelihood.
  config.task.ood = ("svamp", "arc_easy", "piqa", "sciq", "openbookqa", "boolq")
  config.eval.texts = ("tiny_shakespeare",)
  # An answer is `7 + 2 = 9.` and `The answer is 9`, under 20 tokens; the rest is for samples that reason at length.
  config.sample.max_new_tokens = config.eval.max_new_tokens = 48
  config.sample.batch_size = config.eval.batch_size = 32
  config.sample.compute_dtype = config.sft.compute_dtype = "float32"  # few CPUs have products of bfloat16
  config.sft.row_length = 256  # three questions with their answers
  config.sft.global_batch = 16
  config.sft.learning_rate = 5e-5
  config.eval.passages = 4
  config.analysis.examples, config.analysis.drift = 64, 8  # each costs a part of what SFT does
  if size == "quick":
    config.rounds = 1
    config.task.questions_per_round = 200
    config.sample.num_samples = 4  # one in seven is right
    config.task.eval_questions = 60
  elif size == "base":
    config.method = "real"
    config.rounds = 1
    config.task.name = "asdiv_one_step"
    config.task.ood = config.eval.texts = ()
    config.task.questions_per_round = 300
    config.task.eval_questions = 40
    config.sft.epochs = 1
    config.analysis.examples = config.analysis.drift = 0
  else:
    config.rounds = 3
    config.task.questions_per_round = 200  # three rounds of fresh ones: there are 601
    config.prompt.few_shot = 0  # the base has learned the form
    config.task.eval_questions = 100
  return config
