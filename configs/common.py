"""Every setting with its default, unit and source. A config file starts from `get_config()` and changes what it needs.

Sources: [paper] the IMM paper and its appendix A; [code] the command its authors published; [ours] our choice.
"""

import ml_collections
from ml_collections import config_dict

from imm_jax.merging import registry


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.model = "tiny"  # base model: an HF checkpoint folder, a hub id, or "tiny" for the embedded one
  # imm: SFT on right samples and merge in each round; iimm: each layer's change scaled by its importance (eq. 7);
  # star: SFT, no merge; data_mixture, data_accumulation: star on earlier rounds' answers too; real: on worked answers;
  # l2_sp, kl: star held near the base; ema: the average of SFT's weights is handed on; lora: star on adapters;
  # rest_em: each round trains the base; wise_ft: star merged at the end; lines: by depth. See docs/methods.md.
  config.method = "imm"
  config.teacher = ""  # a stronger model (folder or hub id) that samples in place of the trained one [paper: 5.4]
  config.rounds = 3  # T [paper]; a finished run may be continued with more
  config.seed = 0  # of questions, samples, order of training and drop masks

  config.task = task = ml_collections.ConfigDict()
  task.name = "stories"  # in-domain task: sampled, trained and evaluated
  task.source = ""  # where its questions are: hf:ID[:CONFIG], tfds:NAME, file:PATH; empty for the published place
  task.fields = _strings("question", "answer", "rationale", "choices")  # of a custom task's records
  task.kind = "number"  # of a custom task's answers: number, latex or choice
  # Out-of-domain tasks, evaluated only; NAME=SOURCE where one's questions are elsewhere, lm_eval:NAME for a task of
  # lm-evaluation-harness.
  task.ood = ("groups", "compare", "price", "sequence", "choice")
  task.questions_per_round = 500  # of the train split, fresh ones while they last; 0 for all of them in every round
  task.eval_questions = 200  # test questions of each task; 0 for all

  config.prompt = prompt = ml_collections.ConfigDict()
  # A sentence before everything else that describes the task. Where paper shows worked examples, "like given examples
  # below:" takes the place of its full stop.
  prompt.header = ""
  # paper: its template, worked examples as in tables 11 and 12; chat: the tokenizer's chat template, examples as turns.
  prompt.style = "paper"
  # Worked examples when sampling for training, 0 for none [paper: tables 11 and 12 hold 8, its appendix A.1 says 10].
  prompt.few_shot = 8

  config.sample = sample = ml_collections.ConfigDict()
  sample.num_samples = 3  # k, answers to each question [paper: GSM8K 3, MATH 6]
  # Sample j uses number j modulo their count [paper]. A tuple of tuples gives each round its own, and those after the
  # last what the last has: ((0.4,), (0.6, 0.8)). B-STaR (arXiv 2412.17256) chooses them itself, here they are given.
  sample.temperatures = (0.2, 0.4, 0.6)
  sample.top_p = 1.0  # nucleus: 1 keeps the whole distribution [code]
  sample.max_new_tokens = 512  # tokens of an answer [ours]
  # An answer ends before any of these strings, in evaluation with eval.protocol=paper too.
  sample.stop = ("### Instruction", "### Response", "\nQuestion:")
  sample.batch_size = 64  # samples decoded at once (native)
  # Of weights, activations and cache, in evaluation too: bfloat16, float32, or auto, which is float32 on CPUs that
  # have no products of bfloat16.
  sample.compute_dtype = "auto"

  config.sampler = sampler = ml_collections.ConfigDict()
  sampler.kind = "native"  # what samples, in evaluation too: this package, on the devices that train; or vllm
  sampler.vllm = vllm = ml_collections.ConfigDict()
  vllm.python = ""  # of an environment with vLLM, whose server each stage starts on this host; empty for this Python
  vllm.urls = ()  # or servers that run elsewhere and see --workdir under the same path: ("http://host:8000",)
  vllm.args = ()  # more arguments of a server that is started: ("--gpu-memory-utilization=0.8",)
  vllm.restart = ""  # a command that starts the servers elsewhere again with {model}, in place of a reload
  vllm.sleep = False  # leave a server that is started here asleep between stages, without weights (level 2; GPUs alone)
  vllm.concurrency = 512  # requests under way at each server; one asks for all of a question's samples at a temperature
  vllm.timeout = 1800.0  # seconds that a request may take, waiting included
  vllm.start_timeout = 1800.0  # seconds that a server may take to start or reload
  vllm.tolerance = 0.0  # nats that log-probabilities may differ from the native decoder's; 0: what rounding explains

  config.data = data = ml_collections.ConfigDict()
  data.mixture_share = 0.5  # of each earlier round's right answers that data_mixture adds [ours]
  data.with_real = False  # whether data_accumulation adds the real worked answers of all rounds' questions
  # Whether a round without a right answer hands on what it started from; else it ends the run, which goes on from there
  # with other temperatures of that round (sample.temperatures).
  data.skip_empty = False
  data.real_fraction = 0.0  # share of real worked answers in what a round trains on; at 1 nothing is sampled [ours]

  config.sft = sft = ml_collections.ConfigDict()
  sft.epochs = 3  # passes over a round's answers [paper]
  sft.learning_rate = 2e-5  # peak [paper]
  sft.schedule = "cosine"  # after the warm-up: cosine, linear or constant [code]
  sft.warmup_ratio = 0.03  # share of steps with a rising learning rate [paper]
  sft.weight_decay = 0.0  # AdamW's [code]
  # [paper: table 5] gradient_decay, gradient_clipping, weight_masking, or none; `training.interventions` defines them
  sft.intervention = "none"
  sft.gradient_decay = 0.9  # gamma
  sft.max_norm = 2.0  # of gradient_clipping, in place of grad_clip
  sft.top_share = 0.3  # of each matrix's entries that weight_masking lets move
  # Weights of what holds SFT near the base: w/2 ||theta - base||^2 with method l2_sp [ours: AdamW's step is as long
  # whatever the gradient's size, so w has to outweigh it only where a weight has moved by about 1e-2], and of the mean
  # KL(base || model) of a learned token with method kl [Learning without Forgetting: 1].
  sft.l2_sp_weight = 0.01
  sft.kl_weight = 1.0
  # Whether an average of the weights over SFT is kept and evaluated beside, float32; method ema hands it on.
  sft.ema = False
  sft.ema_decay = 0.99  # its memory is 1 / (1 - decay) steps: about a round's last epoch in a run of hundreds [ours]
  # Of method lora: W + alpha / rank B A on all projections [ours; the paper's ranks are 1 to 64]. It takes a higher
  # sft.learning_rate, 1e-4 or more, and with sft.remat none or dots the sums are kept for the backward pass.
  sft.lora_rank = 16
  sft.lora_alpha = 32.0
  # Share of a round's questions that SFT does not see: it ends at the first epoch that raises the loss on their
  # answers, and gives the best epoch's weights. 0 for none [paper: 3 epochs].
  sft.stop_share = 0.0
  sft.grad_clip = 1.0  # largest global norm of the gradient, 0 for none [ours: the HF trainer's default]
  sft.global_batch = 128  # answers of an optimizer step over all devices, on average [paper: 4 x 8 x 4]
  sft.accumulation = 1  # parts that a batch is run in: less memory, same gradient
  sft.row_length = 1024  # tokens of a packed row; longer answers are dropped and counted
  sft.compute_dtype = "auto"  # of activations, as above; weights, moments and gradients are float32 [paper: bfloat16]
  # Computed again in the backward pass, from least memory to most: full (all), attention (all but what attention reads
  # and gives), dots (all but matrix products), none (which with fsdp keeps the gathered weights, too).
  sft.remat = "full"
  sft.attention = "auto"  # xla, blockwise (CPU), cudnn (NVIDIA), splash (TPU); auto: what suits the platform
  sft.export = "model"  # dtype of the tuned model: model (as it was) or float32, in which eq. 4 sees small changes
  sft.log_every = 10  # steps between metrics; the host waits for the device only then, and to save
  sft.save_interval = 200  # steps between training states on disk; SIGTERM saves one too
  sft.max_to_keep = 2  # training states kept; all are removed when a round's training is done
  sft.state_dir = ""  # where they are: a folder or a bucket (gs://...); empty for the run directory

  config.merge = merge = ml_collections.ConfigDict()
  # alpha of eq. 6, the weight of the base [paper]; table 3's alpha is 1 - base_weight. A number; a list over the
  # layers, first to last; or auto: chosen in each round on questions that are held out (merge.auto).
  merge.base_weight = config_dict.FieldReference(0.5, field_type=object)
  merge.drop_rate = 0.2  # DARE's p [code]; 1 - p is the density of methods that have one, unless options say another
  # Any method of `imm_jax.merging` (ties, slerp, model_stock, ...) in place of the method's own; `base_weight` then is
  # the weight of the base in a mean, or 1 minus the scale of what is added to the base.
  merge.method = ""
  merge.options = options = ml_collections.ConfigDict()  # of that method; None for its default
  for name in registry.round_options():
    options[name] = config_dict.FieldReference(None, field_type=object)
  merge.delta_ref = "start"  # delta = tuned - start of the round (eq. 5), or tuned - "base" [code]
  merge.sweep = ()  # more base weights that are merged and evaluated beside, and lead nowhere
  merge.auto = auto = ml_collections.ConfigDict()
  auto.weights = (0.1, 0.3, 0.5, 0.7, 0.9)  # that are tried
  auto.general = ("groups", "compare")  # tasks whose train splits stand for what is to be kept, as in task.ood
  auto.questions = 200  # held-out questions of the in-domain task, and of each of these
  auto.groups = 0  # of layers, each with a weight of its own; 0 for one weight
  auto.step = 0.2  # by which a group's weight is tried higher and lower

  config.eval = evaluation = ml_collections.ConfigDict()
  # How test questions are asked and answers read: paper (zero-shot in the prompt of training [code]), harness
  # (math-evaluation-harness's few-shot chain of thought) or qwen (Qwen2.5-Math's chat); see docs/protocols.md.
  evaluation.protocol = "paper"
  evaluation.few_shot = -1  # worked examples before a test question; -1 for as many as the protocol has
  # Worked examples (jsonl with question, answer, rationale, task) in place of those of train splits; empty for these.
  evaluation.shots_file = ""
  # Of an answer; -1 for what the protocol's own code allows: paper 512 [code], harness 1024, qwen 2048.
  evaluation.max_new_tokens = -1
  evaluation.batch_size = 64  # questions decoded at once (native)
  evaluation.num_samples = 0  # M, samples of each question for pass@k and the majority vote; 0 for greedy answers only
  evaluation.pass_at_k = (1, 2, 4, 8, 16, 32, 64)  # those up to M
  evaluation.temperature = 0.6  # of the samples [ours]
  evaluation.top_p = 1.0  # of the samples
  # Tasks of multiple choice whose options are scored by likelihood, besides those that are made for it (arc_easy, ...).
  evaluation.by_likelihood = ()
  evaluation.texts = ()  # of which nats a token are measured: NAME of a corpus, or text=SOURCE
  # Passages of each text, of about 500 tokens, at most: a passage takes as long as ten questions; 0 for as many as
  # task.eval_questions.
  evaluation.passages = 0
  evaluation.lm_eval = lm_eval = ml_collections.ConfigDict()
  lm_eval.path = ""  # a folder with YAML files of tasks, besides lm_eval's own
  lm_eval.few_shot = -1  # worked examples; -1 for as many as the task has
  lm_eval.chat = False  # whether prompts go through the tokenizer's chat template

  config.analysis = analysis = ml_collections.ConfigDict()
  # Answers of a round, at most, that layer importance and token entropy are measured on; 0 for neither [ours]
  analysis.examples = 256
  # Test questions of each task, at most, on whose worked answers a round's models are compared with the base (KL, loss,
  # entropy; see docs/measures.md); 0 for none [ours]
  analysis.drift = 32

  # Where metrics go besides metrics.jsonl and TensorBoard: wandb for Weights & Biases (docs/operations.md), or nowhere.
  config.tracking = ""
  config.profile = ""  # steps of each round's SFT that the profiler records, such as "10:13", into WORKDIR/profile

  config.mesh = mesh = ml_collections.ConfigDict()
  mesh.data = -1  # copies of the model, each with its share of a batch; -1 for it and fsdp: chosen by the model's size
  mesh.fsdp = -1  # devices that a copy's weights and moments are split over; -1 for one of them takes all that are left
  mesh.tensor = 1  # devices that the work on each row is split over
  return config.lock()  # a key that is not here is a mistake


def _strings(*names: str) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict.fromkeys(names, ""))
