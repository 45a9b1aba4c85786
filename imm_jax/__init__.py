"""Iterative Model Merging (IMM): language models that improve their own reasoning without going shallow.

    import imm_jax

    model = imm_jax.load("tiny")  # or an HF folder, a hub id, BASE+ADAPTER
    answers = model.sample(["### Instruction:\\nWhat is 3 + 4?\\n\\n### Response: Let's think step by step.\\n"])

docs/python_api.md shows the rest. Each name is imported at its first use, so that importing the package takes no time
and does not initialize jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from imm_jax import merging, tasks
  from imm_jax.api.model import Model, forward, load
  from imm_jax.api.runs import run
  from imm_jax.api.training import fine_tune, importance
  from imm_jax.errors import UserError

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "fine_tune", "forward", "importance", "load", "merging", "run", "tasks"]

# The module that each name is imported from; None for a name that is itself a module.
_MODULES = {"Model": "imm_jax.api.model", "UserError": "imm_jax.errors", "fine_tune": "imm_jax.api.training",
          "forward": "imm_jax.api.model", "importance": "imm_jax.api.training", "load": "imm_jax.api.model",
          "merging": None, "run": "imm_jax.api.runs", "tasks": None}


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = _MODULES[name]
  value = getattr(importlib.import_module(module), name) if module else importlib.import_module(f"{__name__}.{name}")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
