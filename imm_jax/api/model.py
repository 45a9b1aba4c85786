"""Loads a model into memory, computes its logits, samples and likelihoods, and saves it.

Progress bars go to stderr; TQDM_DISABLE=1 in the environment hides them.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from imm_jax import files
from imm_jax.api import checks
from imm_jax.errors import UserError
from imm_jax.model import hf, hub, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params, bind
from imm_jax.model.tokenization import encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.runtime import distributed
from imm_jax.sampling import Completion, Prompt
from imm_jax.scoring import Score, Scorer, encode_continuations

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# A text to continue, and the answer that is to follow it.
Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
  """Holds a language model in memory; `load` makes one.

  It is immutable: `with_params` and `fine_tune` return new ones.

  Attributes:
    config: sizes, activation, norms and rotary embedding.
    params: a nested dict of arrays with the checkpoint's names and layouts, layers stacked:
      `params["layers"]["mlp"]["up_proj"]["weight"]` is [L, F, D].
    tokenizer: of transformers.
    folder: the checkpoint folder; `save` copies config.json, generation_config.json and the tokenizer's files from it.
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
    """Gives the checkpoint's tensor names in a tree like `params`, for `names=` of `imm_jax.merging`.

    With them a list of weights runs over the layers, regexes see the names that they see on disk, and the masks are
    those of `imm merge` with the same seed.
    """
    return hf.tensor_names(self.params)

  def with_params(self, params: Params) -> "Model":
    """Returns the model with other parameters, such as merged ones, placed on its mesh.

    Raises:
      ValueError: when the tree is not of the form of `params`.

    >>> model = load("tiny")
    >>> model.with_params(jax.tree.map(jnp.zeros_like, model.params)).logits([1, 2, 3]).max().item()
    0.0
    """
    expected = _shapes(abstract_params(self.config))
    given = _shapes(params)
    if expected != given:
      wrong = sorted(path for path in expected.keys() | given.keys() if expected.get(path) != given.get(path))
      raise ValueError("params: not of this model's form: " + ", ".join(
          f"{path} is {given.get(path, 'missing')}, expected {expected.get(path, 'none')}" for path in wrong[:8]))
    return dataclasses.replace(self, params=jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, sharding.param_sharding(
            self.mesh, sharding.path_name(path), leaf.shape)), params))

  def encode(self, text: str) -> list[int]:
    """Returns the token ids of a text that the model is to continue, the first token included where there is one."""
    return encode_prompt(self.tokenizer, text, rows=self.config.vocab_size)

  def logits(self, tokens: ArrayLike | Sequence[int] | str, *, compute_dtype: str = "auto") -> jax.Array:
    """Computes the logits of the token that follows each token: `forward`, jitted.

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
    ids = np.asarray(self.encode(tokens) if isinstance(tokens, str) else tokens)
    checks.check_ids(ids, self.config.vocab_size, self.config.max_positions)
    array = jnp.asarray(ids, jnp.int32)
    logits = _compiled(self.config, checks.resolve_compute_dtype(compute_dtype))(self.params, jnp.atleast_2d(array))
    return logits if array.ndim == 2 else logits[0]

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

    checks.check_prompts(prompts)
    sampler = NativeSampler(self.folder, params=self.params, mesh=self.mesh, batch_size=batch_size,
                            compute_dtype=checks.resolve_compute_dtype(compute_dtype))
    with_ids = [prompt if isinstance(prompt, Prompt) else Prompt(str(i), prompt) for i, prompt in enumerate(prompts)]
    temperatures = tuple(float(t) for t in np.atleast_1d(temperature))
    return sampler.generate(with_ids, max_new_tokens=max_new_tokens, num_samples=num_samples, temperatures=temperatures,
                            top_p=top_p, stop=stop, seed=seed)

  def score(self, pairs: Sequence[Pair], *, compute_dtype: str = "auto") -> list[Score]:
    """Computes the log-likelihood of continuations, as lm-evaluation-harness defines it (`loglikelihood`).

    Args:
      pairs: (context, continuation), the latter with the space before it, if any.
      compute_dtype: as in `logits`.

    Returns:
      For each pair `logprob`, the sum of log p over the continuation's tokens in nats; `greedy`, whether each token is
      the argmax of its logits; and `tokens`, their number.

    Raises:
      UserError: for a continuation without a token of its own, or longer than the model's context.
      ValueError: for what is no pair of texts.

    >>> right, wrong = load("tiny").score([("3+4=", "7"), ("3+4=", "9")])
    >>> right.logprob > wrong.logprob
    True
    """
    checks.check_pairs(pairs)
    scorer = Scorer(self.config, self.params, mesh=self.mesh, compute_dtype=checks.resolve_compute_dtype(compute_dtype))
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
    with files.write_atomically(out) if distributed.is_main() else contextlib.nullcontext(out) as target:
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
  checks.check_dtype(dtype)
  folder = hub.resolve(os.fspath(model))
  config = hf.read_config(folder)
  tokenizer = load_tokenizer(folder, rows=config.vocab_size)
  mesh = mesh or sharding.make_mesh(data=-1, fsdp=-1, hidden_size=config.hidden_size)
  _, params = hf.load(folder, dtype=None if dtype is None else jnp.dtype(dtype),
                      place=functools.partial(sharding.param_sharding, mesh))
  return Model(config, params, tokenizer, folder, mesh)


def forward(config: ModelConfig, params: Params, tokens: jax.Array, *, positions: jax.Array | None = None,
            segment_ids: jax.Array | None = None, compute_dtype: str = "float32", remat: str = "none") -> jax.Array:
  """Computes logits as a pure function of the parameters, to be jitted, differentiated and mapped.

  Args:
    config: of the model.
    params: its parameters, layers stacked.
    tokens: int32 [B, T].
    positions: int32 [B, T], counted from 0 in every text; by default each row is one text.
    segment_ids: int32 [B, T], the number of the text that a token belongs to, 0 for padding; a token attends to earlier
      ones of the same text.
    compute_dtype: of activations and matrix products.
    remat: which activations are recomputed in the backward pass: none, dots, attention, full; see `decoder.REMAT`.

  Returns:
    float32 logits [B, T, V].

  >>> model = load("tiny", dtype="float32")
  >>> loss = lambda params: -jax.nn.log_softmax(forward(model.config, params, jnp.array([[1, 2]])))[0, 0, 2]
  >>> jax.grad(loss)(model.params)["norm"]["weight"].shape
  (128,)
  """
  default_positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  return bind(config, params)(
      tokens, positions=default_positions if positions is None else positions,
      segment_ids=jnp.ones_like(tokens) if segment_ids is None else segment_ids,
      compute_dtype=jnp.dtype(compute_dtype), remat=remat)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
  return {jax.tree_util.keystr(path, simple=True, separator="."): np.shape(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, compute_dtype: str) -> Callable[[Params, jax.Array], jax.Array]:
  return jax.jit(lambda params, tokens: forward(config, params, tokens, compute_dtype=compute_dtype))
