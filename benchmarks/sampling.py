"""The native sampler beside transformers' `generate`, or vLLM through this package beside vLLM alone, on equal cores.

    python benchmarks/sampling.py --workdir=/tmp/sampling-benchmark --shape=small --cores=2
    python benchmarks/sampling.py --workloads=ragged --dtypes=bfloat16 --vllm_python=/path/to/venv/bin/python

Two workloads on a random checkpoint with a tokenizer: `equal` (prompts of 128 tokens, greedy, exactly
128 new ones, batches of 32) and `ragged` (512 prompts of 32 to 128 tokens, temperature 1, one token in 64 ends an
answer, 256 tokens at most; `generate` takes the prompts in batches, in the order given). Each runs in a process of its
own, once with other prompts to warm up (compilation) and once for the clock. Prints a Markdown table; for `equal` in
float32 also how many texts are equal.

With `--vllm_python` the peer is vLLM's offline `LLM.generate`, with the same requests and seeds; beside it is a server
that this package starts, as a run does, from the first request to the last answer.
"""

import json
import os
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import random_checkpoints
from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "/tmp/sampling-benchmark", "The checkpoint goes here.")
_SHAPE = flags.DEFINE_enum("shape", "small", sorted(random_checkpoints.SHAPES), "Of the checkpoint.")
_REPEATS = flags.DEFINE_integer("repeats", 2, "Processes of each kind, interleaved; the faster counts.", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Rows at once.")
_ONLY = flags.DEFINE_list("workloads", ["equal", "ragged"], "Which to run.")
_PEER = flags.DEFINE_bool("transformers", True, "Run transformers too.")
_VLLM = flags.DEFINE_string("vllm_python", "", "The python of an environment with vLLM: it is run, and is the peer.")
_ROWS = flags.DEFINE_integer("vllm_rows", 128, "Rows at once in vLLM (max_num_seqs).")
_CORES = flags.DEFINE_integer("cores", 2, "Every process is pinned to this many cores.", lower_bound=1)
_CHILD = flags.DEFINE_string("child", None, "Internal: workload,dtype,program.")
END = "<|endoftext|>"
NEW, PROMPT, MOST, MEAN, RAGGED = 128, 128, 256, 64, 512


def make(folder: Path) -> None:
  """The checkpoint with a byte-level tokenizer of as many ids: bytes, pairs of letters, words of three letters."""
  import tokenizers
  import transformers

  vocab = random_checkpoints.SHAPES[_SHAPE.value][-1]
  random_checkpoints.make(folder, _SHAPE.value, 0)
  if not (folder / "tokenizer.json").exists():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    room = vocab - len(alphabet) - 1
    # All letters, or as many as leave room for half of the words.
    letters = string.ascii_lowercase[:max(n for n in range(27) if n**2 + 1.5 * n**3 <= room)]
    space = "\u0120"  # how byte-level tokenizers write a space
    pairs = [(a, b) for a in letters for b in letters]
    triples = [(a + b, c) for a, b in pairs for c in letters]
    merges = [*pairs, *triples, *((space, a + b) for a, b in triples)]
    merges = merges[:room]
    ids = {word: i for i, word in enumerate([END, *alphabet, *(a + b for a, b in merges)])}
    transformers.Qwen2Tokenizer(vocab=ids, merges=merges, eos_token=END, pad_token=END, unk_token=None,
                                ).save_pretrained(folder)


def workload(name: str, folder: Path, seed: int) -> tuple[list[str], list[int]]:
  """Prompts of known numbers of tokens, and the ids that end an answer, which are the same for every seed."""
  tokenizer = transformers_tokenizer(folder)
  vocab = len(tokenizer)
  ends = sorted(np.random.default_rng(0).choice(vocab, vocab // MEAN, replace=False).tolist())
  rng = np.random.default_rng(seed)
  words = sorted(word for word in tokenizer.get_vocab() if len(word) == 4)  # a space and three letters
  text = lambda count: "".join(words[i].replace("\u0120", " ") for i in rng.integers(0, len(words), count))
  if name == "equal":
    return [text(PROMPT) for _ in range(_BATCH.value)], []
  return [text(count) for count in rng.integers(32, PROMPT + 1, RAGGED)], ends


def transformers_tokenizer(folder: Path):
  """What AutoTokenizer finds there."""
  import transformers

  return transformers.AutoTokenizer.from_pretrained(folder)


def ours(name: str, dtype: str, folder: Path) -> dict:
  """Seconds and tokens of the native sampler."""
  from imm_jax.sampling import Prompt
  from imm_jax.sampling.native import NativeSampler

  _, ends = workload(name, folder, 0)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends or None}))
  sampler = NativeSampler(folder, compute_dtype=dtype, batch_size=_BATCH.value)
  options = {"max_new_tokens": NEW} if name == "equal" else {"max_new_tokens": MOST, "temperatures": (1.0,)}
  seconds = []
  for seed in (1, 0):
    asked = [Prompt(f"{seed}/{i}", p) for i, p in enumerate(workload(name, folder, seed)[0])]
    started = time.perf_counter()
    done = [c for c, in sampler.generate(asked, **options)]
    seconds.append(time.perf_counter() - started)
  return {"seconds": seconds, "count": sum(c.num_tokens for c in done), "texts": [c.text for c in done]}


def theirs(name: str, dtype: str, folder: Path) -> dict:
  """Seconds and tokens of transformers, batch after batch."""
  import torch
  import transformers

  prompts, ends = workload(name, folder, 0)
  (folder / "generation_config.json").unlink(missing_ok=True)
  tokenizer = transformers_tokenizer(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
  torch.manual_seed(0)
  options = ({"max_new_tokens": NEW, "do_sample": False} if name == "equal" else
             {"max_new_tokens": MOST, "do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": ends})

  def run(some: list[str]) -> list[list[int]]:
    rows = []
    for begin in range(0, len(some), _BATCH.value):
      batch = [tokenizer(text)["input_ids"] for text in some[begin:begin + _BATCH.value]]
      length = max(map(len, batch))
      ids = torch.tensor([[0] * (length - len(p)) + p for p in batch])
      mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch])
      with torch.no_grad():
        rows += model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options)[:, length:].tolist()
    return rows

  seconds = []
  for some in (prompts[:_BATCH.value], prompts):  # nothing is compiled: a batch is enough to warm up
    started = time.perf_counter()
    rows = run(some)
    seconds.append(time.perf_counter() - started)
  last = [next((i + 1 for i, t in enumerate(row) if t in set(ends)), len(row)) for row in rows]
  return {"seconds": seconds, "count": sum(last), "texts": tokenizer.batch_decode(rows, skip_special_tokens=True)}


def through_vllm(name: str, dtype: str, folder: Path) -> dict:
  """Seconds and tokens of a vLLM server that this package starts."""
  from imm_jax.sampling.vllm import sampler as vllm

  work = _vllm_work(name, dtype, folder)
  args = [f"--{key.replace('_', '-')}={value}" for key, value in work["engine"].items() if not isinstance(value, bool)]
  flagged = [f"--{'' if value else 'no-'}{key.replace('_', '-')}" for key, value in work["engine"].items()
             if isinstance(value, bool)]
  with vllm.VllmSampler(folder, python=_VLLM.value, args=(*args, *flagged), compute_dtype=dtype,
                        log=folder / "vllm.log") as sampler:
    seconds = []
    for prompts in _vllm_prompts(name, folder):
      started = time.perf_counter()
      done = [c for c, in sampler.generate(prompts, max_new_tokens=work["max_tokens"], temperatures=(1.0,))]
      seconds.append(time.perf_counter() - started)
  return {"seconds": seconds, "count": sum(c.num_tokens for c in done), "counts": [c.num_tokens for c in done],
          "texts": [c.text for c in done]}


def offline_vllm(name: str, dtype: str, folder: Path) -> dict:
  """Seconds and tokens of vLLM alone."""
  work = folder / "work.json"
  work.write_text(json.dumps(_vllm_work(name, dtype, folder)))
  from imm_jax.sampling.vllm.server import environment

  done = subprocess.run([_VLLM.value, Path(__file__).with_name("vllm_offline.py"), work], capture_output=True,
                        text=True, check=False, env=environment(_VLLM.value, os.environ))
  if done.returncode:
    sys.exit(done.stderr)
  # vLLM's own messages stand around it.
  found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"')))
  return found | {"count": sum(found["counts"]), "texts": found["counts"]}


def _vllm_prompts(name: str, folder: Path) -> list[list]:
  """A short run to warm up, then the workload."""
  from imm_jax.sampling import Prompt

  return [[Prompt(f"{seed}/{i}", text) for i, text in enumerate(workload(name, folder, seed)[0][:count])]
          for seed, count in ((1, _BATCH.value), (0, None))]


def _vllm_work(name: str, dtype: str, folder: Path) -> dict:
  """What both ways to vLLM are given."""
  from imm_jax.sampling.vllm import sampler as vllm

  _, ends = workload(name, folder, 0)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends or None}))
  tokenizer = transformers_tokenizer(folder)
  runs = []
  for prompts in _vllm_prompts(name, folder):
    ids = [tokenizer(p.text)["input_ids"] for p in prompts]
    runs.append([{"ids": r.ids, "seed": r.seed, "temperature": r.temperature}
                 for r in vllm._requests(prompts, ids, 1, (1.0,), 0)])
  # On the CPU backend a seeded request whose prompt is run in parts ends the server.
  engine = {"enforce_eager": True, "max_num_seqs": _ROWS.value, "max_model_len": 1024,
            "enable_chunked_prefill": False, "max_num_batched_tokens": 4096}
  return {"folder": str(folder), "dtype": dtype, "engine": engine, "max_tokens": NEW if name == "equal" else MOST,
          "ends": sorted({*ends, tokenizer.eos_token_id}), "runs": runs}


def main(_: list[str]) -> None:
  folder = Path(_WORKDIR.value) / _SHAPE.value
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES.value])  # and all children
  if _CHILD.value:
    name, dtype, program = _CHILD.value.split(",")
    print(json.dumps(PROGRAMS[program](name, dtype, folder)))
    return
  make(folder)
  # The last is the peer.
  programs = ["imm_jax", *(["imm_jax with vLLM", "vLLM offline"] if _VLLM.value else ["transformers"] * _PEER.value)]
  rows = f"batches of {_BATCH.value}" + f", {_ROWS.value} rows in vLLM" * bool(_VLLM.value)
  print(f"{_SHAPE.value}, {rows}\n\n| workload | dtype | program | tokens | tokens an answer | s "
        f"| tokens/s | warm-up s | this / {programs[-1]} |\n|---|---|---|---|---|---|---|---|---|")
  for name in _ONLY.value:
    for dtype in _DTYPES.value:
      best: dict[str, dict] = {}
      for _ in range(_REPEATS.value):
        for program in programs:
          output = random_checkpoints.run_child(__file__, f"{name},{dtype},{program}")
          found = json.loads(output.splitlines()[-1])
          if program not in best or found["seconds"][1] < best[program]["seconds"][1]:
            best[program] = found
      rates = {program: run["count"] / run["seconds"][1] for program, run in best.items()}
      for program, run in best.items():
        ratio = f"{rates[program] / rates[programs[-1]]:.2f}" if program != programs[-1] else ""
        print(f"| {name} | {dtype} | {program} | {run['count']} | "
              f"{run['count'] / len(run['texts']):.0f} | {run['seconds'][1]:.2f} | {rates[program]:.0f} | "
              f"{run['seconds'][0]:.1f} | {ratio} |", flush=True)
      if _VLLM.value:
        same = [a == b for a, b in zip(*(best[p]["counts"] for p in programs[1:]), strict=True)]
        print(f"| {name} | {dtype} | answers as long | {sum(same)} of {len(same)} | | | | | |", flush=True)
      elif name == "equal" and dtype == "float32" and _PEER.value:
        same = [a == b for a, b in zip(best["imm_jax"]["texts"], best["transformers"]["texts"], strict=True)]
        print(f"| {name} | {dtype} | equal texts | {sum(same)} of {len(same)} | | | | | |", flush=True)


PROGRAMS = {"imm_jax": ours, "transformers": theirs, "imm_jax with vLLM": through_vllm, "vLLM offline": offline_vllm}


if __name__ == "__main__":
  app.run(main)
