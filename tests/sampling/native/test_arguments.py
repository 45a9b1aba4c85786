"""Errors and warnings of the sampler: arguments, prompts, and folders that do not match their tokenizer."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from imm_jax import errors
from imm_jax.errors import UserError
from imm_jax.model import hf
from imm_jax.sampling import Prompt
from imm_jax.sampling.native import sampler as native
from tests import TINY

ASKED = [Prompt("question", "Tom has 3 apples.")]


@pytest.mark.parametrize("options", [
    {"max_new_tokens": 0}, {"num_samples": 0}, {"temperatures": ()}, {"temperatures": (-1.0,)}, {"top_p": 0.0},
    {"top_p": float("nan")}, {"top_p": 2.0}, {"stop": ("",)}, {"stop": "The"}, {"seed": 2**32}], ids=str)
def test_arguments_out_of_range_are_errors(sampler: native.NativeSampler, options: dict) -> None:
  with pytest.raises(ValueError, match=f"{next(iter(options))}.*expected"):
    sampler.generate(ASKED, **{"max_new_tokens": 4, **options})


def test_a_prompt_without_tokens_is_named(sampler: native.NativeSampler) -> None:
  with pytest.raises(ValueError, match="prompt 'empty' has no tokens"):
    sampler.generate([*ASKED, Prompt("empty", "")], max_new_tokens=4)


@pytest.mark.parametrize("token", [-5, 568])
def test_a_token_outside_of_the_embedding_is_named(sampler: native.NativeSampler, token: int) -> None:
  with pytest.raises(UserError, match=rf"prompt 'ids' has token id {token}; expected ids from 0 to 567"):
    sampler.generate([*ASKED, Prompt("ids", "", (5, token, 7))], max_new_tokens=4)


@pytest.mark.parametrize("temperatures", [(0.0,), (1.0,)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("where", ["embed_tokens", "norm"])
def test_logits_that_are_not_finite_are_an_error(temperatures: tuple[float, ...], where: str) -> None:
  _, params = hf.load(TINY, dtype=jnp.float32)
  value = jnp.nan if where == "norm" else jnp.inf
  broken = {**params, where: jax.tree.map(lambda x: x.at[-1].set(value), params[where])}
  sampler = native.NativeSampler(TINY, compute_dtype="float32", batch_size=8, params=broken)
  with pytest.raises(UserError, match=r"logits are NaN or infinite after prompt 'question' in float32"):
    sampler.generate(ASKED, max_new_tokens=4, temperatures=temperatures)


def test_an_unknown_kernel_is_an_error() -> None:
  with pytest.raises(ValueError, match="kernel='paged': expected one of auto, xla, columns, ragged, gqa"):
    native.NativeSampler(TINY, kernel="paged")


@pytest.mark.parametrize("dtype", ["foo", "int8", ""])
def test_unknown_dtypes_are_errors(dtype: str) -> None:
  with pytest.raises(ValueError, match=f"compute_dtype='{dtype}': expected one of bfloat16, float16, float32"):
    native.NativeSampler(TINY, compute_dtype=dtype)


@pytest.mark.parametrize("ids", [True, -1, 568, [0, 568], "0", 1.0, [[0]]], ids=str)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_invalid_end_of_text_tokens_are_errors(tmp_path: Path, ids: object, file: str) -> None:
  folder = shutil.copytree(TINY, tmp_path / "model")
  (folder / "generation_config.json").unlink()
  content = json.loads((TINY / file).read_text())
  (folder / file).write_text(json.dumps({**content, "eos_token_id": ids}))
  with pytest.raises(UserError, match=r"eos_token_id=.*; expected a token id, from 0 to 567") as error:
    native.NativeSampler(folder, compute_dtype="float32")
  assert str(error.value).startswith(str(folder / file))


@pytest.mark.parametrize("ids", [None, [], 3, [3, 5]], ids=str)
def test_end_tokens_of_folder_and_tokenizer(tmp_path: Path, ids: object) -> None:
  """Tokens that end a text come from both."""
  folder = shutil.copytree(TINY, tmp_path / "model")
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
  expected = {0, *(ids if isinstance(ids, list) else [ids])} - {None}
  assert native.NativeSampler(folder, compute_dtype="float32")._eos == tuple(sorted(expected))


@pytest.mark.full
def test_samples_past_the_context_give_one_warning(
    tmp_path: Path, sampler: native.NativeSampler, capsys: pytest.CaptureFixture[str]) -> None:
  limit = json.loads((TINY / "config.json").read_text())["max_position_embeddings"]
  length = len(sampler.tokenizer(ASKED[0].text)["input_ids"])
  warnings = lambda: [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
  errors.print_once.cache_clear()
  sampler.generate(ASKED, max_new_tokens=limit - length)
  assert warnings() == []
  for expected in (1, 0):
    sampler.generate(ASKED, max_new_tokens=limit - length + 1)
    result = warnings()
    assert len(result) == expected
    assert all(f"past the {limit} positions" in line for line in result)
  # Without max_position_embeddings there is no limit.
  folder = shutil.copytree(TINY, tmp_path / "model")
  config = json.loads((folder / "config.json").read_text())
  del config["max_position_embeddings"]
  (folder / "config.json").write_text(json.dumps(config))
  errors.print_once.cache_clear()
  native.NativeSampler(folder, compute_dtype="float32", batch_size=8).generate(ASKED, max_new_tokens=limit)
  assert warnings() == []
