"""The native sampler beside transformers' `generate`, in one interleaved run on the same cores.

    python benchmarks/sampling.py --workdir=/tmp/sampling-benchmark --shape=small --cores=2

Two workloads on a random checkpoint with a tokenizer: `equal` (prompts of 128 tokens, greedy, exactly
128 new ones, batches of 32) and `ragged` (512 prompts of 32 to 128 tokens, temperature 1, one token in 64 ends an
answer, 256 tokens at most; `generate` takes the prompts in batches, in the order given). Each runs in a process of its
own, once with other prompts to warm up (compilation) and once for the clock. Prints a Markdown table; for `equal` in
float32 also how many texts are equal.
"""

import json
import os
import string
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


def main(_: list[str]) -> None:
  folder = Path(_WORKDIR.value) / _SHAPE.value
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES.value])  # and all children
  if _CHILD.value:
    name, dtype, program = _CHILD.value.split(",")
    print(json.dumps({"imm_jax": ours, "transformers": theirs}[program](name, dtype, folder)))
    return
  make(folder)
  programs = ["imm_jax"] + ["transformers"] * _PEER.value
  print(f"{_SHAPE.value}, batches of {_BATCH.value}\n\n| workload | dtype | program | tokens | tokens an answer | s "
        "| tokens/s | warm-up s | this / transformers |\n|---|---|---|---|---|---|---|---|---|")
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
        ratio = f"{rates[program] / rates['transformers']:.2f}" if program == "imm_jax" and _PEER.value else ""
        print(f"| {name} | {dtype} | {program} | {run['count']} | "
              f"{run['count'] / len(run['texts']):.0f} | {run['seconds'][1]:.2f} | {rates[program]:.0f} | "
              f"{run['seconds'][0]:.1f} | {ratio} |", flush=True)
      if name == "equal" and dtype == "float32" and _PEER.value:
        same = [a == b for a, b in zip(best["imm_jax"]["texts"], best["transformers"]["texts"], strict=True)]
        print(f"| {name} | {dtype} | equal texts | {sum(same)} of {len(same)} | | | | | |", flush=True)


if __name__ == "__main__":
  app.run(main)
