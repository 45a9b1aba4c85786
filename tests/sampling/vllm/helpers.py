"""Prompts and completions of the fake servers, and what several tests do with servers."""

import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from imm_jax.model import hf
from imm_jax.sampling import Completion, Prompt, completions
from imm_jax.sampling.vllm import VllmSampler
from tests import TINY
from tests.fake_vllm import END, FakeVllm, tokens_of

TOKENIZER, EOS = completions.load(TINY, 568)
PROMPTS = [Prompt(f"q{i}", f"Tom has {i} apples. How many?") for i in range(8)]
OPTIONS = {"max_new_tokens": 12, "num_samples": 5, "temperatures": (0.0, 0.5, 1.5), "seed": 3}


def sample(*fakes: FakeVllm, prompts: list[Prompt] = PROMPTS, folder: Path = TINY, concurrency: int = 4,
            timeout: float = 30.0, **options: object) -> list[list[Completion]]:
  with VllmSampler(folder, urls=[f.url for f in fakes], compute_dtype="float32", concurrency=concurrency,
                   timeout=timeout) as sampler:
    return sampler.generate(prompts, **{**OPTIONS, **options})


def expect_rows(seeds: dict[tuple[int, ...], dict[float, int]]) -> list[list[Completion]]:
  """Returns the completions for OPTIONS: sample j is number j // 3 of the request with temperature j % 3."""
  rows = []
  for prompt in PROMPTS:
    ids = TOKENIZER(prompt.text)["input_ids"]
    row = []
    for j in range(5):
      temperature = OPTIONS["temperatures"][j % 3]
      tokens = tokens_of(ids, seeds[tuple(ids)][temperature] + j // 3, temperature, 12)
      row.append(Completion(TOKENIZER.decode(tokens, skip_special_tokens=True), len(tokens),
                            "stop" if tokens[-1] == END else "length"))
    rows.append(row)
  return rows


def find_seeds(fake: FakeVllm) -> dict[tuple[int, ...], dict[float, int]]:
  seeds: dict[tuple[int, ...], dict[float, int]] = {}
  for body in fake.seen:
    seeds.setdefault(tuple(body["prompt"]), {})[body["temperature"]] = body["seed"]
  return seeds


def add_noise(folder: Path, noise: float) -> Path:
  """Writes the embedded model with noise in its weights."""
  _, params = hf.load(TINY, dtype=jnp.float32)
  rng = np.random.default_rng(0)
  changed = params["layers"]["mlp"]["down_proj"]["weight"]
  params["layers"]["mlp"]["down_proj"]["weight"] = np.asarray(changed) + noise * rng.standard_normal(
      changed.shape).astype(np.float32)
  hf.save(params, folder, like=TINY)
  return folder


def ends(process: int) -> bool:
  """Returns whether a process ends within a while."""
  end = time.monotonic() + 20
  while time.monotonic() < end:
    try:
      if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
        return True
    except OSError:
      return True
    time.sleep(0.05)
  return False
