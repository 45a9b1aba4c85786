"""A model of lm-evaluation-harness that runs this package's decoder; `python -m imm_jax.harness` is its command."""

import collections
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
except ImportError as e:
  raise SystemExit(f"error: lm-evaluation-harness cannot be imported ({e}); pip install -e '.[harness]'") from e

from imm_jax.errors import UserError
from imm_jax.model import checkpoint_folder, hf, hub, sharding
from imm_jax.model.tokenization import encode_continuation, encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.runtime import distributed
from imm_jax.sampling import Completion, Prompt
from imm_jax.sampling.native import NativeSampler, parts
from imm_jax.scoring import Request, Score, Scorer, encode_text, resumable
from imm_jax.scoring.requests import make_request, prefix_id

if TYPE_CHECKING:
  from lm_eval.api.instance import Instance

# lm_eval's defaults of the context and of new tokens, for a model or task that has no limit.
_CONTEXT, _NEW_TOKENS = 2048, 256
# Number of texts that are scored before the results are saved.
_REQUESTS = 1024
# Settings of generation that have no effect at these values. Other values are an error, since they would be ignored.
_NEUTRAL = {"top_k": (None, 0, -1), "repetition_penalty": (None, 1, 1.0), "num_beams": (None, 1),
            "num_return_sequences": (None, 1), "min_p": (None, 0, 0.0), "do_sample": (None, True, False)}
_KNOWN = ("until", "max_gen_toks", "temperature", "top_p")


@register_model("imm_jax")
class HarnessLM(TemplateLM):
  """Evaluates a checkpoint folder, hub id, `tiny` or BASE+ADAPTER as a model of lm_eval.

  `Scorer` computes log-likelihoods, in packed rows in which texts share a common prefix; `NativeSampler` generates
  texts. Only one of the two is in memory at a time.
  """

  def __init__(self, pretrained: str, *, dtype: str = "bfloat16", batch_size: int | str = 1, max_length: int = 0,
               seed: int = 0, data: int = -1, fsdp: int = -1, tensor: int = 1, scratch: Path | str = "",
               **others: Any):
    """Reads the config and the tokenizer; weights are loaded when they are needed.

    Args:
      pretrained: the model.
      dtype: dtype of weights and matrix products: bfloat16, float16 or float32.
      batch_size: number of texts that are generated at a time; `auto` and 1, lm_eval's default, mean 64.
      max_length: largest number of tokens of context and continuation; 0 for the model's own limit.
      seed: seed of sampling at a temperature.
      data: size of the mesh's axis, as `mesh.data` in a config.
      fsdp: likewise, as `mesh.fsdp`.
      tensor: likewise, as `mesh.tensor`.
      scratch: a folder for intermediate results, from which the same calls in the same order resume; empty for none.
      **others: arguments that lm_eval always passes and that have no effect here; any other one is an error.

    Raises:
      UserError: when the model cannot be read, or an argument is unknown.
    """
    super().__init__()
    unknown = sorted(others.keys() - {"device", "max_batch_size", "trust_remote_code"})
    if unknown or others.get("trust_remote_code"):
      raise UserError(f"model_args of imm_jax: {', '.join(unknown) or 'trust_remote_code=True'} is not known; expected "
                      "pretrained, dtype, max_length, seed, data, fsdp, tensor, scratch")
    self._folder, self._dtype, self._seed = hub.resolve(pretrained), dtype, int(seed)
    self._rows = 64 if str(batch_size).startswith("auto") or int(batch_size) == 1 else int(batch_size)
    self.config = hf.check_folder(self._folder)
    self.tokenizer = load_tokenizer(self._folder, rows=self.config.vocab_size)
    self._mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, hidden_size=self.config.hidden_size)
    self._max_length = int(max_length) or self.config.max_positions or _CONTEXT
    self._held: NativeSampler | Scorer | None = None
    self._scratch, self._calls = Path(scratch) if scratch else None, 0
    # Only saved results need to know the model that they belong to.
    self._digest = f"{checkpoint_folder.digest(self._folder)} in {dtype}" if scratch and distributed.is_main() else ""
    # lm_eval expects answers that are decoded alone, in which case some tokenizers drop a leading space.
    self._drops_space = self.tokenizer.decode(encode_continuation(self.tokenizer, " a"))[:1] != " "
    # The completions of the last calls, by context and answer.
    self.completions: dict[tuple[str, str], Completion] = {}

  @property
  def eot_token_id(self) -> int:
    """Returns the id of the end-of-text token."""
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """Returns the id of the token that precedes texts without a context."""
    return prefix_id(self.tokenizer)

  @property
  def max_length(self) -> int:
    """Returns the largest number of tokens of a context and its continuation."""
    return self._max_length

  @property
  def max_gen_toks(self) -> int:
    """Returns the number of tokens to generate if a task has no limit."""
    return _NEW_TOKENS

  @property
  def tokenizer_name(self) -> str:
    """Returns a name for lm_eval's cache of requests."""
    return str(self._folder).replace("/", "__")

  def get_model_info(self) -> dict[str, Any]:
    """Returns what lm_eval records about the model."""
    return {"model_folder": str(self._folder), "model_dtype": self._dtype}

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Returns the token ids of a text."""
    if add_special_tokens is None:
      return encode_prompt(self.tokenizer, string, rows=self.config.vocab_size)
    return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Formats a conversation with the tokenizer's template; leaves out system messages if the template has none.

    Raises:
      UserError: when the template refuses the conversation.
    """
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt,
               "continue_final_message": not add_generation_prompt}
    try:
      return self.tokenizer.apply_chat_template(chat_history, **options)
    except Exception as e:  # a template is a program and may raise anything
      rest = [message for message in chat_history if message["role"] != "system"]
      if len(rest) == len(chat_history):
        raise UserError(f"{self._folder}: its chat template refuses the conversation ({e})") from e
      return self.tokenizer.apply_chat_template(rest, **options)

  def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
    """Computes the log-likelihood of whole texts, in windows of the model's context."""
    texts = [request.args[0] for request in requests]
    windows = [encode_text(self.tokenizer, text, rows=self.config.vocab_size, positions=self.max_length)
               for text in texts]
    scoring_requests = [window for text_windows in windows for window in text_windows]
    scores = iter(self._score(scoring_requests, "lm_eval: texts", quiet=disable_tqdm))
    sums = [math.fsum(next(scores).logprob for _ in text_windows) for text_windows in windows]
    for text, value in zip(texts, sums, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
    return sums

  def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
    """Generates texts up to a stop string; those with the same settings in one batch.

    Raises:
      UserError: when a task sets something that this sampler does not have, or more tokens than the context holds.
    """
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for i, request in enumerate(requests):
      groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
    result = [""] * len(requests)
    end = self.tokenizer.decode([self.eot_token_id])
    for members in groups.values():
      given = requests[members[0]].args[1]
      settings = normalize_gen_kwargs(given, self.max_gen_toks)
      unsupported = [f"{key}={value!r}" for key, value in settings.items()
                     if key not in _KNOWN and value not in _NEUTRAL.get(key, ())]
      if unsupported:
        raise UserError(f"a task asks for {', '.join(unsupported)} in generation, which this sampler does not have; "
                        f"expected {', '.join(_KNOWN)} (--gen_kwargs)")
      if settings.get("do_sample") and given.get("temperature") is None:
        settings["temperature"] = 1.0
      stop = [text for text in handle_stop_sequences(settings.get("until"), eos=end) if text]
      new_tokens, temperature = settings["max_gen_toks"], settings.get("temperature", 0.0)
      room = self.max_length - new_tokens
      if room <= 0:
        raise UserError(f"a task asks for {new_tokens} tokens, and the context of {self._folder} has "
                        f"{self.max_length}; lower max_gen_toks (--gen_kwargs)")
      # Prompts that are too long lose their first tokens, as in lm_eval's own models.
      prompts = [Prompt(str(i), requests[i].args[0], tuple(
          self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id])) for i in members]
      answers = distributed.broadcast(parts.generate(
          lambda part, **options: self._sampler().generate(part, **options), prompts, journal=self._next_journal(),
          model=self._digest, rows=self._rows, label="lm_eval: texts", max_new_tokens=new_tokens,
          temperatures=(temperature,), seed=self._seed, top_p=settings.get("top_p") or 1.0, stop=stop,
          quiet=disable_tqdm))
      for i, (fields,) in zip(members, answers, strict=True):
        completion = Completion(*fields)
        result[i] = completion.text.removeprefix(" ") if self._drops_space else completion.text
        self.completions[requests[i].args[0], result[i]] = completion
        self.cache_hook.add_partial("generate_until", requests[i].args, result[i])
    return result

  def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
                            disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
    scoring_requests = []
    for (_context, continuation), before, scored in requests:
      try:
        scoring_requests.append(make_request(before or [self.prefix_token_id], scored, positions=self.max_length))
      except UserError as e:
        raise UserError(f"the continuation {continuation!r:.80} {e}; it cannot be scored") from None
    scores = self._score(scoring_requests, "lm_eval: continuations", quiet=disable_tqdm)
    for (pair, _before, _scored), score in zip(requests, scores, strict=True):
      self.cache_hook.add_partial("loglikelihood", pair, (score.logprob, score.greedy))
    return [(score.logprob, score.greedy) for score in scores]

  def _score(self, requests: Sequence[Request], label: str, *, quiet: bool) -> list[Score]:
    rows = resumable.compute_rows(
        requests, lambda part, label: [score._asdict() for score in self._scorer().score(
            [Request(*request) for request in part], label=label, quiet=quiet)],
        size=_REQUESTS, journal=self._next_journal(), settings={"model": self._digest}, label=label)
    return [Score(**row) for row in rows]

  def _next_journal(self) -> Path | None:
    self._calls += 1
    return self._scratch and self._scratch / f"lm_eval_{self._calls}.jsonl"

  def _scorer(self) -> Scorer:
    if not isinstance(self._held, Scorer):
      self._held = None  # one of the two is in memory at a time
      self._held = Scorer.load(self._folder, mesh=self._mesh, compute_dtype=jnp.dtype(self._dtype))
    return self._held

  def _sampler(self) -> NativeSampler:
    if not isinstance(self._held, NativeSampler):
      self._held = None
      self._held = NativeSampler(self._folder, compute_dtype=self._dtype, batch_size=self._rows,
                                 mesh=sharding.local_mesh(self._mesh))
    return self._held
