"""Fixtures that several test files share."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import transformers

import imm_jax
from tests import REPO, fake_pod
from tests.merge_folders import models, write

try:
  import torch
  torch.set_num_threads(1)  # for models this small its threads wait for each other, and for the other worker's
except ImportError:  # the tests that need it are skipped
  torch = None

_SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
          "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
          "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}  # torch learns no pad row


def _rope(theta: float, kind: str = "default", **scaling: object) -> dict[str, object]:
  return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


_ID_LENGTH = 25

# Files that take longest go first, so that no worker is left with one at the end.
LONG = [
    "runs/test_processes.py", "runs/test_loop.py", "runs/test_methods.py", "model/test_sharding.py",
    "training/test_trainer_states.py", "analysis/test_importance.py", "training/test_interventions.py",
    "merging/test_sharded.py", "runs/test_loop_errors.py", "sampling/vllm/test_spawn.py", "sampling/vllm/test_loop.py",
    "training/test_trainer.py", "sampling/test_devices.py", "model/test_decoder.py", "sampling/native/test_sampler.py"]


def pytest_configure(config: pytest.Config) -> None:
  """Has all workers, and what they start, share compiled code: the same programs are compiled in many tests."""
  config.compiled = None
  os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every command that is started compiles the package anew
  if not hasattr(config, "workerinput"):
    config.compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="imm_jax-compiled-")
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure(config: pytest.Config) -> None:
  """Removes it."""
  if config.compiled:
    shutil.rmtree(config.compiled, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the tests of LONG before the others."""
  place = {REPO / "tests" / name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_make_parametrize_id(val: object) -> str | None:
  """Makes the part of a test's id for a value: a text or a setting in a few plain characters, where pytest would number
  it or print it whole; None for what has a good one.
  """
  if isinstance(val, str) and len(val) <= _ID_LENGTH and val.isascii() and val.isprintable() and "\\" not in val:
    return None
  return _shorten(_describe(val)) or None


def _describe(value: object) -> str:
  if isinstance(value, dict):
    return ",".join(f"{key}={_describe(x)}" for key, x in value.items()) or "{}"
  if isinstance(value, list | tuple):
    return ",".join(map(_describe, value)) or "empty"
  if isinstance(value, bytes):
    return value.decode(errors="ignore")
  if isinstance(value, Path):
    return value.name
  if isinstance(value, BaseException):
    return f"{type(value).__name__} {value}"
  if isinstance(value, type) or callable(value):
    name = getattr(value, "__qualname__", "").partition(".<locals>")[0]  # of what a helper makes: the helper's
    return "" if name == "<lambda>" else name.rpartition(".")[2]
  return str(value) if isinstance(value, str | int | float | None) else ""


def _shorten(text: str) -> str:
  """Cuts a text after a word, and leaves out what a terminal or a shell takes for something else."""
  plain = re.sub(r"\s+", " ", re.sub(r"[\\\x00-\x08\x7f]", "", text.encode("ascii", "ignore").decode())).strip()
  if len(plain) <= _ID_LENGTH:
    return plain
  return re.sub(r"[^\w)\]}]*(\w*)$", lambda end: "" if len(end[1]) < 12 else end[0], plain[:_ID_LENGTH])


# Family and what it changes in _SIZES: the models whose arithmetic differs.
KINDS = {
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"tie_word_embeddings": False, **_rope(1e6)}),
    "qwen2.5-math": ("Qwen2", {"tie_word_embeddings": False, **_rope(1e4)}),
    "llama": ("Llama", {"tie_word_embeddings": False, "head_dim": 8}),
    "llama2": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4, **_rope(1e4)}),
    "llama3": ("Llama", {"tie_word_embeddings": False, **_rope(5e5)}),
    # The original context is so short that every kind of frequency occurs: kept, blended, stretched.
    "llama3.1": ("Llama", {"tie_word_embeddings": True, **_rope(
        50.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)}),
    "llama-biased": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
                               "hidden_act": "gelu_pytorch_tanh", **_rope(100.0, "linear", factor=3.7)}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None, "num_key_value_heads": 4}),
    "granite": ("Granite", {"tie_word_embeddings": True, "attention_bias": True, "hidden_act": "gelu",
                            "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3,
                            "logits_scaling": 6.0}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 10}),
    # Of the five frequencies two are kept, one is blended, two are divided.
    "qwen3-yarn": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 10, **_rope(
        100.0, "yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0)}),
}


def _torch_model(kind: str, **sizes: int) -> "transformers.PreTrainedModel":
  """A small model whose every parameter is random and matters; its dimensions are all different."""
  family, changes = KINDS[kind]
  config = getattr(transformers, f"{family}Config")(**{**_SIZES, **changes, **sizes})
  model = getattr(transformers, f"{family}ForCausalLM")(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      p.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise if p.ndim == 1 else noise * 1.5 / p.shape[1]**0.5)
  return model.eval()


@pytest.fixture(scope="session")
def run_on_devices() -> Callable[..., str]:
  """Runs a file with arguments as a program of its own on that many faked devices; gives its stderr."""

  def run(file: str, *arguments: object, devices: int = 8) -> str:
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                   "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(imm_jax.__file__).parent.parent)}
    done = subprocess.run([sys.executable, file, *map(str, arguments)], env=environment, capture_output=True, text=True,
                          timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr

  return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
  """What a command is started with; it shares compiled code with all tests, so that a start costs seconds."""
  return {**os.environ}


@pytest.fixture(scope="module")
def seen(out: Path) -> dict[str, Any]:
  """What a test file, run as a program on several devices, has written into its fixture `out`."""
  return json.loads((out / "seen.json").read_text())


@pytest.fixture(scope="session")
def pod_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
  if not all(map(shutil.which, ("bash", "git", "setsid"))) or not Path("/proc/self/cwd").exists():
    pytest.skip("needs Linux, bash and git")
  return fake_pod.make_template(tmp_path_factory.mktemp("pod"))


@pytest.fixture
def pod(pod_template: Path, tmp_path: Path) -> Iterator[fake_pod.Pod]:
  """A repository with launch_tpu.sh and a TPU pod that is not there."""
  pod = fake_pod.Pod(Path(shutil.copytree(pod_template, tmp_path / "pod")))
  yield pod
  for worker in pod.workers():
    for process in pod.running(worker):
      os.killpg(process, signal.SIGKILL)


@pytest.fixture
def checkpoint(tmp_path: Path) -> "Callable[..., tuple[transformers.PreTrainedModel, Path]]":
  """Makes (torch model, its folder) for one of `KINDS`."""

  def make(kind: str, *, dtype: "torch.dtype | None" = None, old_rope_key: bool = False, **sizes: int):
    model = _torch_model(kind, **sizes).to(dtype or torch.float32)
    folder = tmp_path / kind
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if old_rope_key:
      rope = config.pop("rope_parameters")
      config["rope_theta"] = rope.pop("rope_theta")
      if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
      (folder / "config.json").write_text(json.dumps(config))
    return model, folder

  return make


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
  """Four models that can be merged, one of them in shards; nobody writes to them."""
  root = tmp_path_factory.mktemp("models")
  return [write(root / str(i), tree, shards=3 if i == 2 else 1) for i, tree in enumerate(models())]
