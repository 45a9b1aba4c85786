"""A small pretrained Llama, SmolLM2-135M-Instruct, on real one-step word problems: `quick` (default) or `study`.

    python -m imm_jax.main --config=configs/smollm2.py --workdir=runs/smollm2

`quick` is one round, `study` what `benchmarks/smollm2.py` runs with every method.
"""

import ml_collections

from configs import arguments, common


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
  size = arguments.parse(argument, size=("quick", "study"))["size"]
  config = common.get_config()
  config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
  config.task.name = "mawps_one_step"  # it solves some of them, and next to none that take two steps
  # SVAMP's questions are near, the others are general knowledge, scored by likelihood.
  config.task.ood = ("svamp", "arc_easy", "piqa", "sciq", "openbookqa", "boolq")
  config.eval.texts = ("tiny_shakespeare",)
  # An answer is `7 + 2 = 9.` and `The answer is 9`, under 20 tokens; the rest is for those that reason at length.
  config.sample.max_new_tokens = config.eval.max_new_tokens = 48
  config.sample.batch_size = config.eval.batch_size = 32
  config.sample.compute_dtype = config.sft.compute_dtype = "float32"  # few CPUs have products of bfloat16
  config.sft.row_length = 320  # four questions with their answers
  config.sft.global_batch = 8  # a round has a hundred answers, of which 128 would make two steps
  # On train questions that were set apart, 1e-4 raises accuracy in a round (from 3 of 60 to 14), and 5e-5 hardly.
  config.sft.learning_rate = 1e-4
  config.eval.passages = 4  # 2,124 tokens
  config.analysis.examples, config.analysis.drift = 64, 8  # together about as long as SFT takes
  # One sample of eight is right at first. There are three temperatures; the fourth sample has the first one again.
  config.sample.num_samples = 4
  if size == "quick":
    config.rounds = 1
    config.task.questions_per_round = 200  # with 60 test questions of each task a run takes about 10 minutes
    config.task.eval_questions = 60
  else:
    config.task.questions_per_round = 350  # of 593: every round asks the next ones, and then from the first on again
    config.task.eval_questions = 500  # of each task; in domain there are 354
  return config
