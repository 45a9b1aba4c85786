"""Fixtures of the tests of tasks."""

import pytest
from transformers import PreTrainedTokenizerFast

from imm_jax.model import hub
from imm_jax.model.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
  """That of the embedded model; a test may change it."""
  return load_tokenizer(hub.resolve("tiny"))
