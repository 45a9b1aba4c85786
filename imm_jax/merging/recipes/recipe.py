"""Descriptions of merges: models or slices of their layers, a method, its options, config and tokenizer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from imm_jax.errors import UserError
from imm_jax.merging import registry

# Arithmetic is float32, so that float64 only widens what is written.
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32),
          "float64": np.dtype(np.float64)}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Describes layers of the output and the models that they are merged from.

  Attributes:
    models: label -> folder, in the method's order; the label of a base is `base`.
    options: the method's options.
    layers: label -> half-open range [first, end) of layers; None for whole models.
  """

  models: Mapping[str, Path]
  options: Mapping[str, Any]
  layers: Mapping[str, tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Describes the output's tokenizer, and the sources of its tokens' embeddings.

  Attributes:
    source: `union`, `base`, or a model's folder.
    tokens: token -> {source, force}, as in mergekit, with folders in place of models.
    pad_to_multiple_of: pads the vocabulary to a multiple of this size.
  """

  source: str | Path
  tokens: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  pad_to_multiple_of: int | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Describes a merge: its method and inputs, the dtype to write, and the sources of config and tokenizer.

  Attributes:
    method: a method's name in the registry.
    slices: slices of the output in order; a single one for whole models.
    dtype: dtype of the weights; that of the first model by default.
    donor: folder whose config and tokenizer the output takes; that of the first model by default.
    tokens: a tokenizer to build; None copies the donor's.
    chat_template: a template, or `auto`; None copies the donor's.
    parts: folders of bases and adapters from which models of the form BASE+ADAPTER were made.
  """

  method: str
  slices: tuple[Slice, ...]
  dtype: str | None = None
  donor: Path | None = None
  tokens: Tokens | None = None
  chat_template: str | None = None
  parts: tuple[Path, ...] = ()

  @property
  def models(self) -> dict[str, Path]:
    """All folders by labels that are unique across slices."""
    return {prefix + label: folder for prefix, part in zip(self.prefixes, self.slices, strict=True)
            for label, folder in part.models.items()}

  @property
  def inputs(self) -> dict[str, Path]:
    """All folders that the merge reads, by their names in messages."""
    folders = {**self.models, **{f"part of a model, {part}": part for part in self.parts}}
    if self.donor is not None:
      folders["base_model"] = self.donor
    if self.tokens is not None:
      sources = [self.tokens.source, *(entry["source"] for entry in self.tokens.tokens.values())]
      sources = [source.get("model") if isinstance(source, Mapping) else source for source in sources]
      folders |= {f"tokenizer source {source}": source for source in sources if isinstance(source, Path)}
    return folders

  @property
  def prefixes(self) -> list[str]:
    """The prefix of each slice's labels in `models`."""
    return [""] if len(self.slices) == 1 else [f"slices[{i}]." for i in range(len(self.slices))]

  @property
  def options(self) -> Mapping[str, Any]:
    """The options of the first slice."""
    return self.slices[0].options


class OptionError(UserError):
  """Reports options that do not fit a method."""


def build_plan(source: Any, method: str, options: Mapping[str, Any], prefix: str = "") -> Any:
  """Builds the plan of a method; raises OptionError for invalid options, which begins with `prefix`, a slice's."""
  try:
    return registry.METHODS[method](source, **options)
  except (TypeError, ValueError) as e:
    raise OptionError(f"{prefix.removesuffix('.')}{': ' if prefix else ''}{method}: {e}") from e
