"""Requests to score tokens of a text, with the conventions of lm-evaluation-harness."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from imm_jax.errors import UserError
from imm_jax.model.tokenization import check_ids, encode_prompt

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


class Request(NamedTuple):
  """Asks for the scores of the tokens of a text from `start` on, each given all tokens before it.

  Attributes:
    tokens: ids of the whole text.
    start: 1 or more, and less than `len(tokens)`.
  """

  tokens: tuple[int, ...]
  start: int


def encode_continuations(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str]], *, rows: int,
                         positions: int | None) -> list[Request]:
  """Encodes continuations of contexts as lm-evaluation-harness does (`TemplateLM.loglikelihood`).

  Context and continuation are tokenized as one text; the continuation starts after as many tokens as the context has by
  itself. Trailing spaces of the context count as part of the continuation. An empty context is replaced by `prefix_id`.
  Requests longer than the model's context are truncated at the front.

  Args:
    tokenizer: the model's tokenizer.
    pairs: (context, continuation) pairs; continuations include their leading space, if any.
    rows: size of the model's embedding.
    positions: size of the model's context; None if unlimited.

  Raises:
    UserError: for a continuation without a token of its own, or longer than the model's context.
  """
  # A cache, because contexts occur in many pairs.
  encoded: dict[str, list[int]] = {"": []}
  prefix, result = prefix_id(tokenizer), []
  for context, continuation in pairs:
    stripped = context.rstrip()
    if stripped not in encoded:
      encoded[stripped] = encode_prompt(tokenizer, stripped, rows=rows)
    if stripped:
      whole = encode_prompt(tokenizer, context + continuation, rows=rows)
    else:
      whole = check_ids(tokenizer, tokenizer(context + continuation, add_special_tokens=False)["input_ids"], rows)
    context_ids, scored = encoded[stripped], whole[len(encoded[stripped]):]
    if not context_ids and scored[:1] == [prefix]:  # the text already starts with the prefix token
      context_ids, scored = scored[:1], scored[1:]
    try:
      result.append(make_request(context_ids or [prefix], scored, positions=positions))
    except UserError as e:
      raise UserError(f"the continuation {continuation!r:.80} {e}; it cannot be scored") from None
  return result


def make_request(context_ids: Sequence[int], scored: Sequence[int], *, positions: int | None) -> Request:
  """Builds the request for `scored` after at least one token `context_ids`, truncated at the front to `positions`.

  Raises:
    UserError: when `scored` is empty, or does not fit.

  >>> make_request([1, 2, 3], [4, 5], positions=3)
  Request(tokens=(2, 3, 4, 5), start=2)
  """
  if not scored:
    raise UserError("has no token of its own after its context")
  if positions and len(scored) > positions:
    raise UserError(f"has {len(scored)} tokens, more than the {positions} positions of the model")
  ids = [*context_ids, *scored]
  ids = ids[max(0, len(ids) - 1 - positions) if positions else 0:]
  return Request(tuple(ids), len(ids) - len(scored))


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, rows: int, positions: int) -> list[Request]:
  """Encodes a text into requests that score each token once, like lm-evaluation-harness's rolling likelihood.

  The first window starts with `prefix_id`. A text longer than `positions` is split into windows of so many new tokens,
  each conditioned on the last token of the previous one; the last window is extended to the left to full length. If the
  tokenizer itself adds BOS, that is scored after the prefix, as in lm-evaluation-harness.

  Args:
    tokenizer: the model's tokenizer.
    text: any text with at least one token.
    rows: size of the model's embedding.
    positions: size of a window.

  Raises:
    UserError: for a text without tokens.
  """
  ids = check_ids(tokenizer, list(tokenizer(text)["input_ids"]), rows)
  if not ids:
    raise UserError(f"the text {text!r:.60} has no token; it cannot be scored")
  padded = [prefix_id(tokenizer), *ids]
  result, done = [], 0
  while done < len(ids):
    new = min(positions, len(ids) - done)
    # A window has at most `positions` input tokens; all windows but the first have exactly as many.
    begin = done + new - positions if done else 0
    result.append(Request(tuple(padded[max(0, begin):done + new + 1]), done - max(0, begin) + 1))
    done += new
  return result


def prefix_id(tokenizer: "PreTrainedTokenizerBase") -> int:
  """Returns the token that starts a text: BOS, or the end-of-text token if there is no BOS."""
  return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
