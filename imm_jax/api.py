"""The Python API: what `import imm_jax` offers, over the modules that the commands use.

Progress bars go to stderr; TQDM_DISABLE=1 in the environment hides them.
"""

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from imm_jax import api_checks, config_files, distributed, files, hardware
from imm_jax.analysis import ORDERS, importance as layers
from imm_jax.analysis.importance import LayerImportance
from imm_jax.errors import UserError, nearest
from imm_jax.model import attention, hf, hub, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import REMAT, Params, abstract_params, bind
from imm_jax.model.tokenization import encode_continuation, encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.sampling import Completion, Prompt
from imm_jax.scoring import Score, Scorer, encode_continuations
from imm_jax.training import trainer
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.step import make_schedule

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

  from imm_jax.report import Results

# A text to continue, and the answer that is to follow it.
Pair = tuple[str, str]
# Tokens of a packed row, unless a text is longer; then multiples of the other.
_ROW, _STEP = 512, 128


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
  """A language model in memory; `load` makes one.

  It is never changed: `with_params` and `fine_tune` give new ones.

  Attributes:
    config: what its arithmetic depends on.
    params: a nested dict of arrays with the checkpoint's names and layouts, layers stacked:
      `params["layers"]["mlp"]["up_proj"]["weight"]` is [L, F, D].
    tokenizer: transformers' own.
    folder: the checkpoint that config.json, generation_config.json and the tokenizer's files are taken from.
    mesh: the devices that the parameters are split over.
  """

  config: ModelConfig
  params: Params
  tokenizer: "PreTrainedTokenizerBase"
  folder: Path
  mesh: Mesh

  def __repr__(self) -> str:
    leaves = jax.tree.leaves(self.params)
    return (f"Model({self.folder.name}: {sum(leaf.size for leaf in leaves):,} parameters in {leaves[0].dtype}, "
            f"{self.config.num_layers} layers, {self.mesh.size} x {self.mesh.devices.flat[0].device_kind})")

  @property
  def names(self) -> Any:
    """The checkpoint's tensor names in a tree like `params`, for `names=` of `imm_jax.merging`.

    With them a list of weights runs over the layers, regexes see the names that they see on disk, and the masks are
    those of `imm merge` with the same seed.
    """
    return hf.tensor_names(self.params)

  def with_params(self, params: Params) -> "Model":
    """The same model with other parameters, such as merged ones, which are placed on its mesh.

    Raises:
      ValueError: when the tree is not of the form of `params`.

    >>> model = load("tiny")
    >>> model.with_params(jax.tree.map(jnp.zeros_like, model.params)).logits([1, 2, 3]).max().item()
    0.0
    """
    expected = _shapes(abstract_params(self.config))
    found = _shapes(params)
    if expected != found:
      wrong = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
      raise ValueError("params: not of this model's form: " + ", ".join(
          f"{path} is {found.get(path, 'missing')}, expected {expected.get(path, 'none')}" for path in wrong[:8]))
    return dataclasses.replace(self, params=jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, sharding.param_sharding(
            self.mesh, sharding.path_name(path), leaf.shape)), params))

  def encode(self, text: str) -> list[int]:
    """The token ids of a text that the model is to continue."""
    return encode_prompt(self.tokenizer, text, rows=self.config.vocab_size)

  def logits(self, tokens: ArrayLike | Sequence[int] | str, *, compute_dtype: str = "auto") -> jax.Array:
    """What the model expects after each token; see `forward`, of which this is the compiled form.

    Args:
      tokens: a text, or ids [T] or [B, T]. Padding at the end changes nothing of what is before it.
      compute_dtype: of activations: bfloat16, float32, or auto, which is float32 on CPUs without bfloat16.

    Returns:
      float32 logits [T, V] or [B, T, V].

    Raises:
      ValueError: for no token, ids that the model does not have, or more than its context.

    >>> load("tiny").logits("3+4=").argmax(-1).shape
    (4,)
    """
    given = np.asarray(self.encode(tokens) if isinstance(tokens, str) else tokens)
    api_checks.check_ids(given, self.config.vocab_size, self.config.max_positions)
    ids = jnp.asarray(given, jnp.int32)
    found = _compiled(self.config, hardware.compute_dtype(compute_dtype))(self.params, jnp.atleast_2d(ids))
    return found if ids.ndim == 2 else found[0]

  def sample(self, prompts: Sequence[str | Prompt], *, max_new_tokens: int = 256, num_samples: int = 1,
             temperature: float | Sequence[float] = 0.0, top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
             batch_size: int = 64, compute_dtype: str = "auto") -> list[list[Completion]]:
    """Samples completions of every prompt.

    Args:
      prompts: texts. A `sampling.Prompt` brings an id, which decides its random keys; of a text it is its number.
      max_new_tokens: at most this many a completion.
      num_samples: completions of each prompt.
      temperature: 0 is greedy; of several, sample j takes number j modulo their count.
      top_p: sample from the smallest set of tokens that holds this much probability.
      stop: a completion ends before the first of these strings.
      seed: of all completions.
      batch_size: completions that are decoded at once.
      compute_dtype: as in `logits`.

    Returns:
      For each prompt its completions, each with `text`, `num_tokens` and `finish` (`stop` or `length`).

    Raises:
      ValueError: for an argument out of range, or a prompt without a token.

    >>> from imm_jax.tasks import prompts
    >>> question = prompts.build_prompt("Ann has 11 boxes with 2 keys in each. How many keys is that?")
    >>> [[completion]] = load("tiny").sample([question], max_new_tokens=40)
    >>> completion.text
    'The total is 11*2=22. The answer is 22.'
    """
    from imm_jax.sampling.native import NativeSampler

    api_checks.check_prompts(prompts)
    sampler = NativeSampler(self.folder, params=self.params, mesh=self.mesh, batch_size=batch_size,
                            compute_dtype=hardware.compute_dtype(compute_dtype))
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(str(i), prompt) for i, prompt in enumerate(prompts)]
    temperatures = tuple(float(t) for t in np.atleast_1d(temperature))
    return sampler.generate(asked, max_new_tokens=max_new_tokens, num_samples=num_samples, temperatures=temperatures,
                            top_p=top_p, stop=stop, seed=seed)

  def score(self, pairs: Sequence[Pair], *, compute_dtype: str = "auto") -> list[Score]:
    """How likely the model finds continuations, as lm-evaluation-harness counts it (`loglikelihood`).

    Args:
      pairs: (context, continuation), the latter with the space before it, if any.
      compute_dtype: as in `logits`.

    Returns:
      For each pair `logprob`, the sum of log p over the continuation's tokens in nats, `greedy`, whether each is the
      likeliest in its place, and `tokens`, their number.

    Raises:
      UserError: for a continuation without a token of its own, or longer than the model's context.
      ValueError: for what is no pair of texts.

    >>> right, wrong = load("tiny").score([("3+4=", "7"), ("3+4=", "9")])
    >>> right.logprob > wrong.logprob
    True
    """
    api_checks.check_pairs(pairs)
    scorer = Scorer(self.config, self.params, mesh=self.mesh, compute_dtype=hardware.compute_dtype(compute_dtype))
    return scorer.score(encode_continuations(self.tokenizer, pairs, rows=self.config.vocab_size,
                                             positions=self.config.max_positions))

  def save(self, folder: str | os.PathLike[str], *, keep_dtypes: bool = True) -> None:
    """Writes an HF checkpoint folder, which transformers and vLLM read; it appears whole or not at all.

    Args:
      folder: one that does not exist, or is empty.
      keep_dtypes: write each tensor in the dtype that it has in the checkpoint that was loaded, as runs do; else as it
        is in `params`.

    Raises:
      UserError: when the folder holds something, or the disk refuses.
    """
    out = Path(folder)
    if distributed.is_main() and out.exists() and (not out.is_dir() or any(out.iterdir())):
      raise UserError(f"{out}: exists; give another name")
    with files.committed(out) if distributed.is_main() else contextlib.nullcontext(out) as target:
      hf.save(self.params, target, like=self.folder, keep_dtypes=keep_dtypes)


def load(model: str | os.PathLike[str], *, dtype: str | None = None, mesh: Mesh | None = None) -> Model:
  """Loads a checkpoint.

  Args:
    model: an HF checkpoint folder, a hub id such as `Qwen/Qwen2.5-0.5B-Instruct` or `ORG/NAME@REVISION`, `tiny` for the
      embedded model, or BASE+ADAPTER, each a folder or a hub id: a LoRA adapter of peft, which is merged into its base.
    dtype: of the parameters; by default the one that is stored.
    mesh: with the axes data, fsdp and tensor (`model.sharding.make_mesh`); by default over all devices, as in runs.

  Raises:
    UserError: when there is no such model, or it cannot be read.
    ValueError: for another dtype.

  >>> model = load("tiny")
  >>> model.config.num_layers, model.params["layers"]["mlp"]["up_proj"]["weight"].shape
  (4, (4, 384, 128))
  """
  api_checks.check_dtype(dtype)
  folder = hub.resolve(os.fspath(model))
  config = hf.read_config(folder)
  tokenizer = load_tokenizer(folder, rows=config.vocab_size)
  mesh = mesh or sharding.make_mesh(data=-1, fsdp=-1, hidden_size=config.hidden_size)
  _, params = hf.load(folder, dtype=None if dtype is None else jnp.dtype(dtype),
                      place=functools.partial(sharding.param_sharding, mesh))
  return Model(config, params, tokenizer, folder, mesh)


def forward(config: ModelConfig, params: Params, tokens: jax.Array, *, positions: jax.Array | None = None,
            segment_ids: jax.Array | None = None, compute_dtype: str = "float32", remat: str = "none") -> jax.Array:
  """The model as a pure function, to be jitted, differentiated and mapped.

  Args:
    config: of the model.
    params: its parameters, layers stacked.
    tokens: int32 [B, T].
    positions: int32 [B, T], counted from 0 in every text; by default each row is one text.
    segment_ids: int32 [B, T], one number for each text of a row, 0 for padding; tokens see earlier ones of their own.
    compute_dtype: of products and of what they are of.
    remat: what the backward pass keeps: none (all), dots, attention, full; see `decoder.REMAT`.

  Returns:
    float32 logits [B, T, V].

  >>> model = load("tiny", dtype="float32")
  >>> loss = lambda params: -jax.nn.log_softmax(forward(model.config, params, jnp.array([[1, 2]])))[0, 0, 2]
  >>> jax.grad(loss)(model.params)["norm"]["weight"].shape
  (128,)
  """
  whole = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  return bind(config, params)(
      tokens, positions=whole if positions is None else positions,
      segment_ids=jnp.ones_like(tokens) if segment_ids is None else segment_ids,
      compute_dtype=jnp.dtype(compute_dtype), remat=remat)


def fine_tune(model: Model, pairs: Sequence[Pair], *, learning_rate: float = 2e-5, epochs: int = 3,
              global_batch: int = 128, schedule: str = "cosine", warmup_ratio: float = 0.03, weight_decay: float = 0.0,
              grad_clip: float = 1.0, row_length: int | None = None, seed: int = 0, compute_dtype: str = "auto",
              remat: str = "full", ends: bool = True, report: Callable[..., None] | None = None) -> Model:
  """Trains a model on answers: -log p of their tokens, each given the prompt and the tokens before it.

  AdamW with float32 weights and moments, on packed rows, as the SFT of runs; the defaults are the paper's.

  Args:
    model: which is left as it is.
    pairs: (prompt, answer).
    learning_rate: its peak.
    epochs: passes over the pairs.
    global_batch: pairs of a step, on average; a step has one packed row or more.
    schedule: of the learning rate after the warm-up: cosine, linear or constant.
    warmup_ratio: share of the steps with a rising learning rate.
    weight_decay: AdamW's.
    grad_clip: largest global norm of the gradient; 0 does not clip.
    row_length: tokens of a packed row; by default 512, or what the longest pair takes.
    seed: of the order of the pairs.
    compute_dtype: as in `Model.logits`.
    remat: as in `forward`.
    ends: whether each answer is followed by the tokenizer's end-of-text token.
    report: called for each step with its number and, by name, `loss`, `learning_rate`, `grad_norm` and more.

  Returns:
    The tuned model, its parameters in float32.

  Raises:
    UserError: when the loss is not finite.
    ValueError: for no pair, one that is longer than a row or has no prompt or no token to learn, or a wrong argument.

  >>> losses = []
  >>> tuned = fine_tune(load("tiny"), [("3+4=", "8")], learning_rate=1e-3, global_batch=1,
  ...                   report=lambda step, loss, **_: losses.append(loss))
  >>> len(losses), losses[-1] < losses[0]
  (3, True)
  """
  api_checks.check_choice("schedule", schedule, ("cosine", "linear", "constant"))
  api_checks.check_choice("remat", remat, REMAT)
  if epochs < 1 or global_batch < 1:
    raise ValueError(f"epochs={epochs}, global_batch={global_batch}: expected 1 or more")
  batches, options = _pack(model, pairs, epochs=epochs, global_batch=global_batch, row_length=row_length, seed=seed,
                           compute_dtype=compute_dtype, ends=ends)
  rates = make_schedule(schedule, peak=learning_rate, total_steps=len(batches), warmup_ratio=warmup_ratio)
  trained = trainer.train(
      model.config, lambda: _float32(model.params, copied=True), batches, schedule=rates, weight_decay=weight_decay,
      grad_clip=grad_clip, accumulation=1, remat=remat, mesh=model.mesh, log_every=10, label="fine-tune",
      report=report or (lambda *_, **__: None), **options)
  return dataclasses.replace(model, params=trained.params)


def importance(model: Model, pairs: Sequence[Pair], *, order: int = 1, global_batch: int = 128,
               row_length: int | None = None, compute_dtype: str = "auto", ends: bool = True) -> LayerImportance:
  """Measures how much each layer matters for answers: the sum of |gradient x weight| of its matrices (eq. 3).

  Args:
    model: the model.
    pairs: (prompt, answer); the gradient is that of the mean loss over all of them.
    order: 1, or 2 to add the second-order term of eq. 2.
    global_batch: pairs of a forward pass, on average.
    row_length: as in `fine_tune`.
    compute_dtype: as in `Model.logits`.
    ends: as in `fine_tune`.

  Returns:
    `total`, float64 [L], and `modules`, the same by the module's name (`q_proj`), whose sum it is. `total` goes to
    `importance=` of `imm_jax.merging.iimm`.

  Raises:
    UserError: when the gradient is not finite.
    ValueError: as `fine_tune`, and for another order.

  >>> scores = importance(load("tiny"), [("3+4=", "7")])
  >>> scores.total.shape, len(scores.modules)
  ((4,), 7)
  """
  if order not in ORDERS:
    raise ValueError(f"order={order}: expected 1 or 2")
  batches, options = _pack(model, pairs, epochs=1, global_batch=global_batch, row_length=row_length, seed=0,
                           compute_dtype=compute_dtype, ends=ends)
  params = _float32(model.params)
  if order == 1:
    return layers.layer_importance(params, layers.gradient(
        model.config, params, batches, mesh=model.mesh, label="importance", **options))
  return layers.layer_importance(params, *layers.gradient_and_squares(
      model.config, params, batches, mesh=model.mesh, label="importance", **options))


def run(config: str | os.PathLike[str] | ml_collections.ConfigDict, *, workdir: str | os.PathLike[str],
        rerun: bool = False, **changes: Any) -> "Results":
  """Runs a config: rounds of sampling, filtering, SFT, merging and evaluation; goes on where an earlier call stopped.

  The same as `imm run --config=CONFIG --workdir=WORKDIR`.

  Args:
    config: a name (`tiny`, `qwen:1.5b,task=math`), a config file, or settings, which are left as they are.
    workdir: the run directory; made if missing.
    rerun: where settings were changed: run again what depends on that, even samples and training that are done.
    **changes: settings by name; `**{"sft.epochs": 1}` for those with a dot. configs/common.py lists all.

  Returns:
    What came out: `models`, base first, each with `label` and by task `scores` (`value`, `low`, `high`, `n`), and what
    else the report shows. The run directory holds the checkpoints, `round_0/merged` and so on.

  Raises:
    UserError: for a setting that does not exist or cannot work, and as the command does.

  >>> run("tiny", workdir="runs/tiny", runds=1)
  Traceback (most recent call last):
  imm_jax.errors.UserError: runds is no setting: did you mean rounds?
  """
  from imm_jax import config as checks, experiments, loop, report

  settings: ml_collections.ConfigDict = copy.deepcopy(config) if isinstance(
      config, ml_collections.ConfigDict) else config_files.load(os.fspath(config))
  if experiments.is_experiment(settings):
    raise UserError("run: the config holds several runs, which `imm run` does; give the config of one")
  known = config_files.keys(settings)
  for key, value in changes.items():
    if key not in known:
      raise UserError(f"{key} is no setting: {nearest(key, known)}")
    try:
      settings.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as e:
      kind = type(functools.reduce(lambda at, part: at[part], key.split("."), settings)).__name__
      raise UserError(f"{key}={value!r}: expected a value of type {kind}") from e
  checks.validate(settings)
  loop.run(settings, os.fspath(workdir), rerun=rerun)
  return report.Results.of(Path(workdir))


def _pack(model: Model, pairs: Sequence[Pair], *, epochs: int, global_batch: int, row_length: int | None, seed: int,
          compute_dtype: str, ends: bool) -> tuple[PackedBatches, dict[str, Any]]:
  """Pairs as batches for the model's devices, and the options that training and gradients share."""
  api_checks.check_pairs(pairs)
  if ends and model.tokenizer.eos_token_id is None:
    raise ValueError("ends=True: the tokenizer has no end-of-text token; give ends=False")
  rows, end = model.config.vocab_size, [model.tokenizer.eos_token_id] * ends
  examples = [TokenizedExample(model.encode(prompt), encode_continuation(model.tokenizer, answer, rows=rows) + end)
              for prompt, answer in pairs]
  for i, example in enumerate(examples):
    if not example.prompt or not example.response:
      raise ValueError(f"pairs[{i}]={pairs[i]!r:.80}: has no token of a prompt, or none to learn")
  longest = max((len(e.prompt) + len(e.response) for e in examples), default=0)
  length = row_length or max(_ROW, -(-longest // _STEP) * _STEP)
  batches = PackedBatches(examples, epochs=epochs, global_batch=global_batch, row_length=length, seed=seed,
                          row_multiple=sharding.num_batch_shards(model.mesh))
  dtype = jnp.dtype(hardware.compute_dtype(compute_dtype))
  backend = attention.choose_backend("auto", model.config, dtype=dtype, length=length, rows=batches.rows,
                                     mesh=model.mesh)
  return batches, {"compute_dtype": dtype, "attention": backend}


def _float32(params: Params, *, copied: bool = False) -> Params:
  """The parameters in float32; those that are that already themselves, or `copied`, for training writes over its own.
  """
  return jax.tree.map(lambda leaf: jnp.copy(leaf) if copied and leaf.dtype == np.float32 else leaf.astype(jnp.float32),
                      params)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
  return {jax.tree_util.keystr(path, simple=True, separator="."): np.shape(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, compute_dtype: str) -> Callable[[Params, jax.Array], jax.Array]:
  return jax.jit(lambda params, tokens: forward(config, params, tokens, compute_dtype=compute_dtype))
