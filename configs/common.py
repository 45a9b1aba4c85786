"""Defines every setting with its default, unit and source; config files start from `get_config()` and change some.

Sources: [paper] the IMM paper and its appendix A; [code] the command its authors published; [ours] our choice.
"""

import ml_collections
from ml_collections import config_dict

from imm_jax.merging import registry


def get_config() -> ml_collections.ConfigDict:
  """Returns the default settings, locked, so that an unknown key is an error."""
  config = ml_collections.ConfigDict()
  config.model = "tiny"  # base model: an HF checkpoint folder, a hub id, or "tiny" for the embedded one
  # imm: SFT on right samples and merge in each round; iimm: each layer's change scaled by its importance (eq. 7);
  # star: SFT, no merge; data_mixture, data_accumulation: star on earlier rounds' answers too; real: on worked answers;
  # l2_sp, kl: star held near the base; ema: the average of SFT's weights is handed on; lora: star on adapters;
  # rest_em: each round trains the base; wise_ft: star merged at the end; lines: by depth. See docs/methods.md.
  config.method = "imm"
  config.teacher = ""  # a stronger model (folder or hub id) that samples in place of the trained one [paper: 5.4]
  config.rounds = 3  # T [paper]; a finished run may be continued with more
  config.seed = 0  # seed of questions, samples, order of training and drop masks

  config.task = task = ml_collections.ConfigDict()
  task.name = "stories"  # in-domain task: sampled, trained and evaluated
  task.source = ""  # source of its questions: hf:ID[:CONFIG], tfds:NAME, file:PATH; empty for the published one
  task.fields = _strings("question", "answer", "rationale", "choices")  # of a custom task's records
  task.kind = "number"  # of a custom task's answers: number, latex or choice
  # Out-of-domain tasks, which are only evaluated: NAME, NAME=SOURCE for questions from another source, or lm_eval:NAME
  # for a task of lm-evaluation-harness.
  task.ood = ("groups", "compare", "price", "sequence", "choice")
  task.questions_per_round = 500  # train questions, new ones in each round as long as there are; 0 for all in every one
  task.eval_questions = 200  # number of test questions of each task; 0 for all

  config.prompt = prompt = ml_collections.ConfigDict()
  # A sentence at the start of a prompt that describes the task. If prompt.style=paper shows worked examples, "like
  # given examples below:" replaces its full stop.
  prompt.header = ""
  # paper: its template, worked examples as in tables 11 and 12; chat: the tokenizer's chat template, examples as turns.
  prompt.style = "paper"
  # Worked examples when sampling for training, 0 for none [paper: tables 11 and 12 hold 8, its appendix A.1 says 10].
  prompt.few_shot = 8

  config.sample = sample = ml_collections.ConfigDict()
  sample.num_samples = 3  # k, answers to each question [paper: GSM8K 3, MATH 6]
  # Sample j has the temperature with number j modulo their count [paper]. A tuple of tuples has one tuple for each
  # round, the last also for all later rounds: ((0.4,), (0.6, 0.8)). (B-STaR, arXiv 2412.17256, adapts temperatures
  # itself.)
  sample.temperatures = (0.2, 0.4, 0.6)
  sample.top_p = 1.0  # nucleus: 1 keeps the whole distribution [code]
  sample.max_new_tokens = 512  # tokens of an answer [ours]
  # An answer ends before any of these strings; also in evaluation with eval.protocol=paper.
  sample.stop = ("### Instruction", "### Response", "\nQuestion:")
  sample.batch_size = 64  # samples that are decoded at a time (native)
  # Dtype of weights, activations and cache, also in evaluation: bfloat16, float32, or auto, which is float32 on CPUs
  # without bfloat16 products and bfloat16 elsewhere.
  sample.compute_dtype = "auto"

  config.sampler = sampler = ml_collections.ConfigDict()
  sampler.kind = "native"  # the sampler, also in evaluation: native (this package, on the training devices) or vllm
  # The native sampler's attention to a row's own tokens: columns (CPUs), xla, ragged (TPUs), gqa (GPUs), or auto:
  # columns on CPUs, xla elsewhere. Ragged and gqa have not been run on their devices.
  sampler.attention = "auto"
  sampler.vllm = vllm = ml_collections.ConfigDict()
  vllm.python = ""  # Python of an environment with vLLM, whose server each stage starts here; empty for this Python
  vllm.urls = ()  # or servers that run elsewhere and see --workdir under the same path: ("http://host:8000",)
  vllm.args = ()  # more arguments of a server that is started here: ("--gpu-memory-utilization=0.8",)
  vllm.restart = ""  # a command that restarts the servers of urls with {model}; empty to make them reload weights
  vllm.sleep = False  # keep a server that is started here asleep between stages, without weights (level 2; GPUs only)
  vllm.concurrency = 512  # requests at a time to each server, each for all samples of a question at a temperature
  vllm.timeout = 1800.0  # seconds that a request may take, including its time in the queue
  vllm.start_timeout = 1800.0  # seconds that a server may take to start or reload
  vllm.tolerance = 0.0  # nats that log-probabilities may differ from the native decoder's; 0: what rounding explains

  config.data = data = ml_collections.ConfigDict()
  data.mixture_share = 0.5  # share of each earlier round's right answers that data_mixture adds [ours]
  data.with_real = False  # whether data_accumulation adds the real worked answers of all rounds' questions
  # Whether a round with nothing to train on hands on the model that it started from. Otherwise it ends the run, which
  # can be continued with other temperatures of that round (sample.temperatures).
  data.skip_empty = False
  data.real_fraction = 0.0  # share of real worked answers in what a round trains on; at 1 nothing is sampled [ours]

  config.sft = sft = ml_collections.ConfigDict()
  sft.epochs = 3  # passes over a round's answers [paper]
  sft.learning_rate = 2e-5  # peak of the schedule [paper]
  sft.schedule = "cosine"  # after the warm-up: cosine, linear or constant [code]
  sft.warmup_ratio = 0.03  # share of steps with a rising learning rate [paper]
  sft.weight_decay = 0.0  # AdamW's [code]
  # [paper: table 5] gradient_decay, gradient_clipping, weight_masking, or none; `training.interventions` defines them
  sft.intervention = "none"
  sft.gradient_decay = 0.9  # gamma
  sft.max_norm = 2.0  # gradient norm of gradient_clipping, instead of grad_clip
  sft.top_share = 0.3  # share of each matrix's entries that weight_masking trains
  # Weights of the terms that keep SFT near the base: w/2 ||theta - base||^2 with method l2_sp [ours: AdamW's step does
  # not depend on the gradient's size, so the term only has to dominate once a weight has changed by about 1e-2], and
  # the mean KL(base || model) per learned token with method kl [Learning without Forgetting: 1].
  sft.l2_sp_weight = 0.01
  sft.kl_weight = 1.0
  # Whether a moving average of the weights over SFT is kept in float32 and evaluated, too; method ema hands it on.
  sft.ema = False
  sft.ema_decay = 0.99  # averages over about 1 / (1 - decay) steps: the last epoch of a few hundred steps [ours]
  # Method lora trains W + alpha / rank B A on all projections [ours; the paper's ranks are 1 to 64]. It needs a higher
  # sft.learning_rate, 1e-4 or more; with sft.remat none or dots these sums are kept for the backward pass.
  sft.lora_rank = 16
  sft.lora_alpha = 32.0
  # Share of a round's questions that is held out: SFT ends after the first epoch that raises the loss on their answers,
  # and its result is the best epoch's weights. 0 trains all epochs [paper: 3 epochs].
  sft.stop_share = 0.0
  sft.grad_clip = 1.0  # largest global norm of the gradient; 0 does not clip [ours: the HF trainer's default]
  sft.global_batch = 128  # mean number of answers of an optimizer step, over all devices [paper: 4 x 8 x 4]
  sft.accumulation = 1  # number of parts that a batch is run in: less memory, same gradient
  sft.row_length = 1024  # tokens of a packed row; longer answers are dropped and counted
  # Dtype of activations, as sample.compute_dtype; weights, moments and gradients are float32 [paper: bfloat16].
  sft.compute_dtype = "auto"
  # Activations that the backward pass computes again, from least memory to most: full (all), attention (all but the
  # inputs and outputs of attention), dots (all but matrix products), none (which with fsdp also keeps gathered
  # weights).
  sft.remat = "full"
  sft.attention = "auto"  # xla, blockwise (CPU), cudnn (NVIDIA), splash (TPU); auto chooses by platform
  sft.export = "model"  # dtype of the tuned model: model (unchanged), or float32 so that eq. 4 resolves small changes
  sft.log_every = 10  # steps between metrics; the host waits for the device only for these and to save
  sft.save_interval = 200  # steps between training states on disk; SIGTERM saves one, too
  sft.max_to_keep = 2  # number of training states to keep; all are removed when a round's training is done
  sft.state_dir = ""  # folder of training states, possibly in a bucket (gs://...); empty for the run directory

  config.merge = merge = ml_collections.ConfigDict()
  # alpha of eq. 6, the weight of the base [paper]; table 3's alpha is 1 - base_weight. A number; a list over the
  # layers, first to last, interpolated if it has another length; or auto, which chooses it in each round on held-out
  # questions (merge.auto).
  merge.base_weight = config_dict.FieldReference(0.5, field_type=object)
  merge.drop_rate = 0.2  # DARE's p [code]; 1 - p is the density of methods that have one, unless options say another
  # Any method of `imm_jax.merging` (ties, slerp, model_stock, ...) in place of the method's own; `base_weight` then is
  # the weight of the base in a mean, or 1 minus the scale of what is added to the base.
  merge.method = ""
  merge.options = options = ml_collections.ConfigDict()  # of that method; None for its default
  for name in registry.list_round_options():
    options[name] = config_dict.FieldReference(None, field_type=object)
  merge.delta_ref = "start"  # delta = tuned - start of the round (eq. 5), or tuned - "base" [code]
  merge.sweep = ()  # more base weights to merge with and to evaluate; these models are not handed on
  merge.auto = auto = ml_collections.ConfigDict()
  auto.weights = (0.1, 0.3, 0.5, 0.7, 0.9)  # weights to try
  auto.general = ("groups", "compare")  # tasks, as in task.ood, whose train questions measure what a merge preserves
  auto.questions = 200  # number of held-out questions of the in-domain task and of each of these tasks
  auto.groups = 0  # number of groups of layers, each with its own weight; 0 for a single weight
  auto.step = 0.2  # by how much a group's weight is raised and lowered to find a better one

  config.eval = evaluation = ml_collections.ConfigDict()
  # How test questions are asked and answers read: paper (zero-shot in the prompt of training [code]), harness
  # (math-evaluation-harness's few-shot chain of thought) or qwen (Qwen2.5-Math's chat); see docs/protocols.md.
  evaluation.protocol = "paper"
  evaluation.few_shot = -1  # number of worked examples before a test question; -1 for the protocol's own
  # A file of worked examples (jsonl with question, answer, rationale, task); empty for those of train splits.
  evaluation.shots_file = ""
  # Tokens of an answer; -1 for the limit of the protocol's own code: paper 512 [code], harness 1024, qwen 2048.
  evaluation.max_new_tokens = -1
  evaluation.batch_size = 64  # questions that are decoded at a time (native)
  evaluation.num_samples = 0  # M, samples of each question for pass@k and the majority vote; 0 for greedy answers only
  evaluation.pass_at_k = (1, 2, 4, 8, 16, 32, 64)  # values of k; those above M are left out
  evaluation.temperature = 0.6  # of the M samples [ours]
  evaluation.top_p = 1.0  # of the M samples
  # Multiple-choice tasks whose options are scored by likelihood, besides those that always are (arc_easy, ...).
  evaluation.by_likelihood = ()
  evaluation.texts = ()  # texts whose nats per token are measured: NAME of a corpus, or text=SOURCE
  # Largest number of passages, of about 500 tokens, of each text; 0 for task.eval_questions. A passage takes as long as
  # ten questions.
  evaluation.passages = 0
  evaluation.lm_eval = lm_eval = ml_collections.ConfigDict()
  lm_eval.path = ""  # a folder with YAML files of more tasks
  lm_eval.few_shot = -1  # number of worked examples; -1 for the task's own
  lm_eval.chat = False  # whether prompts use the tokenizer's chat template

  config.analysis = analysis = ml_collections.ConfigDict()
  # Largest number of a round's answers on which layer importance and token entropy are measured; 0 for neither [ours].
  analysis.examples = 256
  # Largest number of test questions per task on whose worked answers a round's models are compared with the base (KL,
  # loss, entropy; see docs/measures.md); 0 for none [ours].
  analysis.drift = 32

  # wandb sends metrics to Weights & Biases, too (docs/operations.md); empty for metrics.jsonl and TensorBoard only.
  config.tracking = ""
  config.profile = ""  # steps of each round's SFT that the profiler records, such as "10:13", into WORKDIR/profile

  config.mesh = mesh = ml_collections.ConfigDict()
  # Number of copies of the model, each with its share of a batch, and number of devices that the weights and moments of
  # a copy are split over. -1 for one of the two: all remaining devices; for both: chosen by the model's size.
  mesh.data = -1
  mesh.fsdp = -1
  mesh.tensor = 1  # number of devices that the work on each row is split over
  return config.lock()


def _strings(*names: str) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict.fromkeys(names, ""))
