"""Writes `merging/__init__.pyi`, from which type checkers and editors know the functions that the registry makes.

    python -m imm_jax.merging.stubs
"""

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

from imm_jax import files
from imm_jax.merging import registry

FILE = Path(__file__).with_name("__init__.pyi")
_HEAD = '''"""Signatures of the registry's functions; `python -m imm_jax.merging.stubs` writes this file."""

from collections.abc import Sequence
from typing import Literal

import jax

from imm_jax.merging import registry
from imm_jax.merging.masks import quantize_drop_rate
from imm_jax.merging.options import PerModel, Vector
from imm_jax.merging.trees import PyTree, Setting, default_names

'''
_WIDTH = 120


def make_stub() -> str:
  """Returns the content of the file."""
  functions = registry.load()
  names = sorted([*functions, "default_names", "quantize_drop_rate", "registry"])
  exported = "__all__ = [\n" + "".join(f'  "{name}",\n' for name in names) + "]"
  return _HEAD + "\n\n".join([exported, *(_format(name, functions[name]) for name in sorted(functions))]) + "\n"


def _format(name: str, function: Callable[..., object]) -> str:
  """Formats a function's signature with the first line of its docstring."""
  parameters: list[str] = []
  for parameter in inspect.signature(function).parameters.values():
    if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
      parameters.append("*")
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    kind = parameter.annotation if isinstance(parameter.annotation, str) else parameter.annotation.__name__
    parameters.append(f"{parameter.name}: {kind}{default}")
  # A line ends between parameters, not within one.
  head = textwrap.fill(", ".join(parameters).replace(" ", "\0").replace(",\0", ", "), _WIDTH - len(") -> PyTree:"),
                       initial_indent=f"def {name}(", subsequent_indent=" " * len(f"def {name}("),
                       break_on_hyphens=False).replace("\0", " ")
  summary = (function.__doc__ or "").partition("\n")[0]
  return f'{head}) -> PyTree:\n  """{summary}' + '\n  ' * (len(summary) > _WIDTH - 8) + '"""'


if __name__ == "__main__":
  files.write_text(FILE, make_stub())
