"""What a merge is made of: models or slices of their layers, a method, its options, config and tokenizer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from imm_jax.errors import UserError
from imm_jax.merging import registry

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Layers of the output and the models that they are merged from.

  Attributes:
    models: label -> folder, in the method's order, the base's label `base`.
    options: of the method.
    layers: label -> the first layer and the one after the last that is taken; None for whole models.
  """

  models: Mapping[str, Path]
  options: Mapping[str, Any]
  layers: Mapping[str, tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Which tokenizer the output has, and where its tokens' rows come from.

  Attributes:
    source: `union`, `base`, or a model's folder.
    tokens: token -> {source, force}, as mergekit has it, with folders in place of models.
    pad_to_multiple_of: rows that the vocabulary is padded to a multiple of.
  """

  source: str | Path
  tokens: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  pad_to_multiple_of: int | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A merge: a method, what it takes, the dtype to write, and what decides config and tokenizer.

  Attributes:
    method: of the registry.
    slices: one for whole models, else one after the other.
    dtype: of the weights; the first model's unless given.
    donor: the folder whose config and tokenizer the output has; the first model's unless given.
    tokens: a tokenizer to build; None to copy the donor's.
    chat_template: a template, or `auto`; None to copy the donor's.
    name: what later documents of the same file call the output.
  """

  method: str
  slices: tuple[Slice, ...]
  dtype: str | None = None
  donor: Path | None = None
  tokens: Tokens | None = None
  chat_template: str | None = None
  name: str | None = None

  @property
  def models(self) -> dict[str, Path]:
    """All folders by labels that tell slices apart."""
    return {prefix + label: folder for prefix, part in zip(self.prefixes, self.slices, strict=True)
            for label, folder in part.models.items()}

  @property
  def prefixes(self) -> list[str]:
    """Of the labels of each slice."""
    return [""] if len(self.slices) == 1 else [f"slices[{i}]." for i in range(len(self.slices))]

  @property
  def options(self) -> Mapping[str, Any]:
    """The first slice's."""
    return self.slices[0].options


def build(source: Any, method: str, options: Mapping[str, Any]) -> Any:
  """The plan of a method; what its options have wrong is a UserError."""
  try:
    return registry.METHODS[method](source, **options)
  except (TypeError, ValueError) as e:
    raise UserError(f"{method}: {e}") from e
