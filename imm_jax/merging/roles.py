"""Roles of a checkpoint's tensors by their names: which have a row for each token, and which precede the layers.

The names are those of the families of transformers. A tensor of unknown name that has the vocabulary's size is an
error where tokens are reordered, because its rows would keep the old order.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from imm_jax import files
from imm_jax.errors import UserError, join_items
from imm_jax.merging.trees import get_layer
from imm_jax.model.safetensors import Entry

# Input embeddings: Llama and most others; GPT-2; GPT-NeoX; BERT, Falcon, Bloom, XLNet; InternLM2, ModernBERT; CLIP; T5,
# BART; Mamba, RWKV, XLM.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings?|tok_embeddings|token_embedding|shared|"
                        r"(backbone|rwkv|transformer)\.embeddings)\.weight$")
# Output heads: Llama and most others, RoBERTa, Phi's first; GPT-NeoX; InternLM2; ChatGLM; BERT, ALBERT; DistilBERT;
# Whisper; ModernBERT; Electra; RWKV; XLNet; XLM. Only those with a row for each token count, since others classify.
_HEAD = re.compile(r"(^|\.)(lm_head(\.(decoder|linear))?|embed_out|output|output_layer|predictions(\.decoder)?|"
                   r"vocab_projector|proj_out|decoder|generator_lm_head|head|lm_loss|pred_layer\.proj)\.(weight|bias)$")
# Tensors that may have the vocabulary's size by chance.
_OTHER = re.compile(r"position|(^|\.)wpe\.|token_type|norm|(^|[._])ln")
# Tensors outside the layers that precede them; all others follow the last layer.
_BEFORE = re.compile(r"embed|(^|\.)w[tp]e\.|(^|\.)(shared|project_in)\.")


class Shaped(Protocol):
  """Describes a tensor: an entry of a file, a `jax.ShapeDtypeStruct`, or the tensor itself."""

  shape: tuple[int, ...]


def is_embedding(name: str) -> bool:
  """Returns whether a tensor is an input embedding of tokens.

  >>> is_embedding("gpt_neox.embed_in.weight"), is_embedding("embed_out.weight")
  (True, False)
  """
  return _EMBEDDING.search(name) is not None


def is_head(name: str) -> bool:
  """Returns whether a tensor is by its name an output head over tokens."""
  return _HEAD.search(name) is not None


def precedes_layers(name: str) -> bool:
  """Returns whether a tensor outside the layers precedes them, as embeddings do; all others follow the last layer."""
  return _BEFORE.search(name) is not None and not is_head(name)


def find_embedding(table: Mapping[str, Shaped]) -> str | None:
  """Returns the name of a model's embedding of tokens; None if it has none or several."""
  embeddings = [name for name, tensor in table.items() if is_embedding(name) and len(tensor.shape) == 2]
  return embeddings[0] if len(embeddings) == 1 else None


def find_heads(table: Mapping[str, Shaped]) -> list[str]:
  """Lists the weights of output heads of a model's own: with a row for each token, as its embedding has."""
  embedding = find_embedding(table)
  return [] if embedding is None else [
      name for name, tensor in table.items() if is_head(name) and name.endswith("weight")
      and (tensor.shape == table[embedding].shape or "lm_head" in name)]


def share_heads(tables: Sequence[Mapping[str, Entry]]) -> list[dict[str, Entry]]:
  """Returns the tables with a head in each if any has one: if any input is untied, so is the output.

  The head of a tied model is its embedding.
  """
  heads = dict.fromkeys(name for table in tables for name in find_heads(table))
  result = [dict(table) for table in tables]
  for table in result:
    embedding = find_embedding(table)
    if embedding is not None and not find_heads(table):
      table |= dict.fromkeys((name for name in heads if name not in table), table[embedding])
  return result


def token_tensors(folder: Path, table: Mapping[str, Entry]) -> list[str]:
  """Lists the tensors of a checkpoint that have a row for each token: embedding, head and the head's bias.

  Args:
    folder: the checkpoint's folder, for config.json and errors.
    table: tensor name -> entry.

  Raises:
    UserError: if none is known as the embedding, if embeddings differ in rows, or if another tensor has the
      vocabulary's size.
  """
  shapes = {name: entry.shape for name, entry in table.items()}
  embeddings = [name for name, shape in shapes.items() if is_embedding(name) and len(shape) == 2]
  if not embeddings:
    raise UserError(f"{folder}: none of its tensors is known as the embedding of tokens, such as "
                    "model.embed_tokens.weight, so they cannot be reordered for another tokenizer; merge it without "
                    "tokenizer and tokenizer_source")
  rows = {shapes[name] for name in embeddings}
  if len({shape[0] for shape in rows}) > 1:
    raise UserError(f"{folder}: {join_items([f'{name} {shapes[name]}' for name in embeddings])}: embeddings of "
                    "different numbers of tokens, which one tokenizer cannot serve; merge it without tokenizer and "
                    "tokenizer_source")
  size = next(iter(rows))[0]
  with_rows = embeddings + [name for name, shape in shapes.items() if is_head(name) and shape[:1] == (size,)]
  sizes = {size, *_vocabulary_sizes(files.read_json(folder / "config.json"))} - {shape[1] for shape in rows}
  for name, shape in shapes.items():
    # Projections that happen to have this size are in the first layer too.
    in_all_layers = get_layer(name) is not None and re.sub(r"\d+", "0", name, count=1) in shapes
    if name not in with_rows and not sizes.isdisjoint(shape[:2]) and not in_all_layers and not _OTHER.search(name):
      raise UserError(f"{folder}: {name} {shape} has the size of the vocabulary, but is not known as an embedding or "
                      "output head, so it cannot be reordered for another tokenizer; merge it without tokenizer and "
                      "tokenizer_source")
  return with_rows


def _vocabulary_sizes(config: Mapping[str, Any]) -> Iterator[int]:
  """Yields all sizes of vocabularies that a config.json names, also in nested configs."""
  for key, value in config.items():
    if isinstance(value, dict):
      yield from _vocabulary_sizes(value)
    elif "vocab_size" in key and isinstance(value, int):
      yield value
