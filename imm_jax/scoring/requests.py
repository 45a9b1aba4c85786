"""Texts as token ids of which some are scored, with lm-evaluation-harness's conventions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from imm_jax.errors import UserError
from imm_jax.model.tokenization import check_ids, encode_prompt

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


class Request(NamedTuple):
  """A text of which the tokens from `start` on are scored, each given all that are before it.

  Attributes:
    tokens: ids of the whole text.
    start: 1 or more, and less than their number.
  """

  tokens: tuple[int, ...]
  start: int


def encode_continuations(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str]], *, rows: int,
                         positions: int | None) -> list[Request]:
  """Requests for continuations of contexts, tokenised as lm-evaluation-harness does (`TemplateLM.loglikelihood`).

  Context and continuation are tokenised as one text, of which the continuation is what follows as many tokens as the
  context has by itself; spaces that end the context count as the continuation's. An empty context, or one of spaces,
  stands for what `prefix_id` gives. What does not fit in the model's positions is cut off at the front.

  Args:
    tokenizer: of the model.
    pairs: (context, continuation), the latter with the space before it, if any.
    rows: of the model's embedding.
    positions: of the model's context; None for any number.

  Raises:
    UserError: for a continuation without a token of its own, or longer than the context of the model.
  """
  # A text stands in many pairs.
  encoded: dict[str, list[int]] = {"": []}
  prefix, result = prefix_id(tokenizer), []
  for context, continuation in pairs:
    kept = context.rstrip()
    if kept not in encoded:
      encoded[kept] = encode_prompt(tokenizer, kept, rows=rows)
    if kept:
      whole = encode_prompt(tokenizer, context + continuation, rows=rows)
    else:
      whole = check_ids(tokenizer, tokenizer(context + continuation, add_special_tokens=False)["input_ids"], rows)
    before, scored = encoded[kept], whole[len(encoded[kept]):]
    if not before and scored[:1] == [prefix]:  # a text that brings what it begins after
      before, scored = scored[:1], scored[1:]
    try:
      result.append(continuing(before or [prefix], scored, positions=positions))
    except UserError as e:
      raise UserError(f"the continuation {continuation!r:.80} {e}; it cannot be scored") from None
  return result


def continuing(before: Sequence[int], scored: Sequence[int], *, positions: int | None) -> Request:
  """The request for what follows some tokens, at least one of them; what does not fit is cut off at the front.

  Raises:
    UserError: where nothing follows, or more than fits.

  >>> continuing([1, 2, 3], [4, 5], positions=3)
  Request(tokens=(2, 3, 4, 5), start=2)
  """
  if not scored:
    raise UserError("has no token of its own after its context")
  if positions and len(scored) > positions:
    raise UserError(f"has {len(scored)} tokens, more than the {positions} positions of the model")
  ids = [*before, *scored]
  ids = ids[max(0, len(ids) - 1 - positions) if positions else 0:]
  return Request(tuple(ids), len(ids) - len(scored))


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, rows: int, positions: int) -> list[Request]:
  """Requests that score every token of a text once, as lm-evaluation-harness's rolling likelihood does.

  The first window begins with what `prefix_id` gives. Where the text is longer than the model's positions it is cut
  into windows of so many new tokens, each after the last token of the one before; the last window looks back as far as
  it can. Where the tokenizer itself begins a text with BOS, that is scored after the first one, as there.

  Args:
    tokenizer: of the model.
    text: any text that has a token.
    rows: of the model's embedding.
    positions: of a window.

  Raises:
    UserError: for a text without a token.
  """
  ids = check_ids(tokenizer, list(tokenizer(text)["input_ids"]), rows)
  if not ids:
    raise UserError(f"the text {text!r:.60} has no token; it cannot be scored")
  padded = [prefix_id(tokenizer), *ids]
  result, done = [], 0
  while done < len(ids):
    new = min(positions, len(ids) - done)
    # Inputs of a window are `positions` tokens at most; all but the first window are given whole ones.
    begin = done + new - positions if done else 0
    result.append(Request(tuple(padded[max(0, begin):done + new + 1]), done - max(0, begin) + 1))
    done += new
  return result


def prefix_id(tokenizer: "PreTrainedTokenizerBase") -> int:
  """The token that a text begins after: BOS, or the end-of-text token where there is none."""
  return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
