"""The JAX sampler: jitted prefill and decode with a key/value cache.

The text of a sample depends on the checkpoint, the prompt, its id, the sample's number and the seed, never on the batch
it ran in: random keys are folded from (seed, prompt id, sample number, token number), and the shapes a prompt runs in
follow from its own length.

Axes: B batch, P prompt length (padded on the left), N new tokens, S = P + N cache slots, V vocabulary.
"""

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax import files, progress
from imm_jax.errors import UserError
from imm_jax.model import hf
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, bind, unstack_layers
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.sampling import Completion, Prompt

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# Steps between looks at the text while stop strings are asked for.
_STOP_CHECK_EVERY = 16
_MIN_PROMPT_BUCKET = 64


class NativeSampler:
  """Samples from an HF checkpoint folder on this process's default device."""

  def __init__(self, folder: str | Path, *, compute_dtype: str = "bfloat16", batch_size: int = 64):
    """Loads the checkpoint.

    Args:
      folder: an HF checkpoint folder with a tokenizer.
      compute_dtype: dtype of weights, activations and cache.
      batch_size: samples that are decoded at once.
    """
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    self._dtype = jnp.dtype(compute_dtype)
    self._batch_size = batch_size
    self.tokenizer = load_tokenizer(folder)
    self._config, params = hf.load(folder, dtype=self._dtype)
    if len(self.tokenizer) > self._config.vocab_size:
      raise UserError(f"{folder}: the tokenizer has {len(self.tokenizer)} ids, the embedding only "
                      f"{self._config.vocab_size} rows")
    self._params = unstack_layers(params, self._config.num_layers)
    self._eos = _eos_ids(Path(folder), self.tokenizer)

  def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, num_samples: int = 1,
               temperatures: Sequence[float] = (0.0,), top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
               label: str = "sample") -> list[list[Completion]]:
    """Samples `num_samples` completions of every prompt.

    Args:
      prompts: ids must differ where independent samples are wanted.
      max_new_tokens: at most this many a sample.
      num_samples: completions of each prompt.
      temperatures: sample j runs at `temperatures[j % len(temperatures)]`; 0 is greedy.
      top_p: sample from the smallest set of tokens that holds this much probability.
      stop: a completion ends before the first of these strings or special tokens.
      seed: of all samples.
      label: what the progress bar says.

    Returns:
      For each prompt, in order, its completions.

    Raises:
      ValueError: for a prompt without a token, or an argument out of range.
    """
    _check(max_new_tokens, num_samples, temperatures, top_p, stop, seed)
    ids = [self.tokenizer(p.text)["input_ids"] for p in prompts]
    if not all(ids):
      raise ValueError("a prompt has no tokens")
    # Special tokens do not show in the text, so that they stop a sample as tokens.
    special = set(stop) & set(self.tokenizer.all_special_tokens)
    ends = tuple(sorted({*self._eos, *(self.tokenizer.convert_tokens_to_ids(s) for s in special)}))
    texts = tuple(s for s in stop if s not in special)
    work = [(_bucket(len(ids[p])), p, s) for p in range(len(prompts)) for s in range(num_samples)]
    work.sort(key=lambda item: item[0])  # stable: one padded length after the other
    results: list[list[Completion | None]] = [[None] * num_samples for _ in prompts]
    total_tokens = 0
    with progress.bar(len(work), label, "sample") as bar:
      for bucket, rows in _batches(work, self._batch_size):
        batch = _Rows.of([ids[p] for p, _ in rows], bucket, self._batch_size)
        keys = _row_keys(seed, [prompts[p].id for p, _ in rows], [s for _, s in rows], self._batch_size)
        row_temperatures = np.zeros(self._batch_size, np.float32)
        row_temperatures[:len(rows)] = [temperatures[s % len(temperatures)] for _, s in rows]
        completions = self._run(batch, keys, row_temperatures, top_p, max_new_tokens, ends, texts)
        for (p, s), completion in zip(rows, completions, strict=True):
          results[p][s] = completion
          total_tokens += completion.num_tokens
        bar.update(len(rows))
        bar.set_postfix(tokens=total_tokens, refresh=False)
    return results

  def _run(self, rows: "_Rows", keys: jax.Array, temperatures: np.ndarray, top_p: float, max_new_tokens: int,
           ends: tuple[int, ...], stop: tuple[str, ...]) -> list[Completion]:
    static = {"config": self._config, "eos": ends, "num_ids": len(self.tokenizer), "top_p": top_p,
              "greedy": not temperatures.any()}
    args = (self._params, jnp.asarray(rows.pad), keys, jnp.asarray(temperatures))
    state = _prefill(*args, jnp.asarray(rows.tokens), jnp.asarray(rows.unused), new_tokens=max_new_tokens,
                     dtype=self._dtype, **static)
    texts: list[Completion | None] = [None] * rows.count
    for end in range(_STOP_CHECK_EVERY if stop else max_new_tokens, max_new_tokens + _STOP_CHECK_EVERY,
                     _STOP_CHECK_EVERY):
      state = _decode(*args, state, jnp.int32(min(end, max_new_tokens)), dtype=self._dtype, **static)
      if not stop or bool(state["done"].all()) or end >= max_new_tokens:
        break
      tokens, step = np.asarray(state["tokens"]), int(state["step"])
      for i in range(rows.count):
        text = self.tokenizer.decode(tokens[i, :step], skip_special_tokens=True)
        if texts[i] is None and any(s in text for s in stop):
          texts[i] = self._completion(tokens[i, :step], ends, stop)
      done = np.asarray(state["done"]) | np.array([t is not None for t in texts] + [True] * (len(keys) - rows.count))
      state["done"] = jnp.asarray(done)
    tokens, step = np.asarray(state["tokens"]), int(state["step"])
    return [texts[i] or self._completion(tokens[i, :step], ends, stop) for i in range(rows.count)]

  def _completion(self, tokens: np.ndarray, ends: tuple[int, ...], stop: tuple[str, ...]) -> Completion:
    ended = np.flatnonzero(np.isin(tokens, ends))
    finish = "stop" if len(ended) else "length"
    if len(ended):
      tokens = tokens[:ended[0] + 1]
    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
    cut = min((text.find(s) for s in stop if s in text), default=-1)
    if cut < 0:
      return Completion(text, len(tokens), finish)
    # The tokens that were needed for the stop string to show.
    count = next(n for n in range(1, len(tokens) + 1)
                 if any(s in self.tokenizer.decode(tokens[:n], skip_special_tokens=True) for s in stop))
    return Completion(text[:cut], count, "stop")


def _check(max_new_tokens: int, num_samples: int, temperatures: Sequence[float], top_p: float, stop: Sequence[str],
           seed: int) -> None:
  if max_new_tokens < 1 or num_samples < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens}, num_samples={num_samples}: expected 1 or more")
  if not len(temperatures) or not all(math.isfinite(t) and t >= 0 for t in temperatures):
    raise ValueError(f"temperatures={temperatures}: expected one or more numbers >= 0")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p}: expected 0 < top_p <= 1")
  if isinstance(stop, str) or not all(stop):
    raise ValueError(f"stop={stop!r}: expected a sequence of strings that are not empty")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed}: expected 0 <= seed < 2**32")


class _Rows:
  """Prompts of one padded length, filled up to a whole batch with unused rows."""

  def __init__(self, tokens: np.ndarray, pad: np.ndarray, count: int):
    self.tokens, self.pad, self.count = tokens, pad, count
    self.unused = np.arange(len(tokens)) >= count

  @classmethod
  def of(cls, ids: list[list[int]], length: int, batch_size: int) -> "_Rows":
    tokens = np.zeros((batch_size, length), np.int32)
    pad = np.full(batch_size, length - 1, np.int32)
    for i, prompt in enumerate(ids):
      pad[i] = length - len(prompt)
      tokens[i, pad[i]:] = prompt
    return cls(tokens, pad, len(ids))


def _bucket(length: int) -> int:
  """The padded length of a prompt: a power of two, so that few shapes are compiled."""
  return max(_MIN_PROMPT_BUCKET, 1 << (length - 1).bit_length())


def _batches(work: list[tuple[int, int, int]], size: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
  """Runs of at most `size` rows of equal padded length."""
  begin = 0
  while begin < len(work):
    bucket = work[begin][0]
    rows = [(p, s) for b, p, s in work[begin:begin + size] if b == bucket]
    yield bucket, rows
    begin += len(rows)


def _row_keys(seed: int, ids: list[str], samples: list[int], batch_size: int) -> jax.Array:
  codes, numbers = np.zeros(batch_size, np.uint32), np.zeros(batch_size, np.uint32)
  codes[:len(ids)] = [zlib.crc32(i.encode()) for i in ids]
  numbers[:len(ids)] = samples
  return _fold(np.uint32(seed), codes, numbers)


@jax.jit
def _fold(seed: jax.Array, codes: jax.Array, numbers: jax.Array) -> jax.Array:
  fold = lambda code, number: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), code), number)
  return jax.vmap(fold)(codes, numbers)


def _eos_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
  """Tokens that end a text: generation_config.json's, else config.json's, and the tokenizer's."""
  path = folder / "generation_config.json"
  ids = files.read_json(path).get("eos_token_id") if path.exists() else None
  if ids is None:
    ids = files.read_json(folder / "config.json").get("eos_token_id")
  found = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
  if not all(isinstance(i, int) for i in found):
    raise UserError(f"{path}: eos_token_id={ids!r}; expected a token id or a list of them")
  return tuple(sorted(found))


def _sample(logits: jax.Array, keys: jax.Array, step: jax.Array | int, temperatures: jax.Array, *, num_ids: int,
            top_p: float, greedy: bool) -> jax.Array:
  """One token for each row from float32 logits [B, V]; ids past the tokenizer's are never drawn."""
  if num_ids < logits.shape[1]:
    logits = jnp.where(jnp.arange(logits.shape[1]) < num_ids, logits, -jnp.inf)
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if greedy:
    return best
  scaled = logits / jnp.maximum(temperatures, 1e-6)[:, None]
  if top_p < 1.0:
    order = jnp.sort(scaled, axis=-1, descending=True)
    probabilities = jax.nn.softmax(order, axis=-1)
    # A token stays while the mass before it is below top_p, so the first always stays.
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    floor = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
    scaled = jnp.where(scaled >= floor, scaled, -jnp.inf)
  step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
  drawn = jax.vmap(jax.random.categorical)(step_keys, scaled).astype(jnp.int32)
  return jnp.where(temperatures > 0, drawn, best)


_STATIC = ("config", "eos", "num_ids", "top_p", "greedy", "dtype")
_State = dict[str, Any]


@functools.partial(jax.jit, static_argnames=(*_STATIC, "new_tokens"))
def _prefill(params: Params, pad: jax.Array, keys: jax.Array, temperatures: jax.Array, tokens: jax.Array,
             unused: jax.Array, *, new_tokens: int, config: ModelConfig, eos: tuple[int, ...], num_ids: int,
             top_p: float, greedy: bool, dtype: jnp.dtype) -> _State:
  """Runs the prompts and draws the first token."""
  batch, length = tokens.shape
  slots = jnp.arange(length)
  mask = (slots[None, :, None] >= slots) & (slots >= pad[:, None])[:, None, :]
  empty = jnp.zeros((batch, config.num_kv_heads, length, config.head_dim), dtype)
  logits, caches = bind(config, params, scan=False).with_cache(
      tokens, positions=jnp.maximum(slots - pad[:, None], 0), mask=mask, caches=[(empty, empty)] * config.num_layers,
      index=0, compute_dtype=dtype)
  widen = lambda cache: jnp.pad(cache, ((0, 0), (0, 0), (0, new_tokens), (0, 0)))
  first = _sample(logits, keys, 0, temperatures, num_ids=num_ids, top_p=top_p, greedy=greedy)
  return {"step": jnp.int32(1), "tokens": jnp.zeros((batch, new_tokens), jnp.int32).at[:, 0].set(first),
          "done": unused | jnp.isin(first, jnp.array(eos, jnp.int32)), "caches": jax.tree.map(widen, caches)}


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _decode(params: Params, pad: jax.Array, keys: jax.Array, temperatures: jax.Array, state: _State, end: jax.Array, *,
            config: ModelConfig, eos: tuple[int, ...], num_ids: int, top_p: float, greedy: bool, dtype: jnp.dtype,
            ) -> _State:
  """Draws tokens until every row is done or `end` tokens stand."""
  model = bind(config, params, scan=False)
  new_tokens = state["tokens"].shape[1]
  slots = jnp.arange(state["caches"][0][0].shape[2])
  length = slots.shape[0] - new_tokens

  def body(state: _State) -> _State:
    step = state["step"]
    slot = length + step - 1
    last = jax.lax.dynamic_slice_in_dim(state["tokens"], step - 1, 1, axis=1)
    mask = ((slots <= slot) & (slots >= pad[:, None]))[:, None, :]
    logits, caches = model.with_cache(last, positions=(slot - pad)[:, None], mask=mask, caches=state["caches"],
                                      index=slot, compute_dtype=dtype)
    token = _sample(logits, keys, step, temperatures, num_ids=num_ids, top_p=top_p, greedy=greedy)
    token = jnp.where(state["done"], eos[0] if eos else 0, token)
    return {"step": step + 1, "tokens": state["tokens"].at[:, step].set(token),
            "done": state["done"] | jnp.isin(token, jnp.array(eos, jnp.int32)), "caches": caches}

  return jax.lax.while_loop(lambda s: (s["step"] < end) & ~jnp.all(s["done"]), body, state)
