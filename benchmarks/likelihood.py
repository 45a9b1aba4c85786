"""Scoring of multiple-choice options, compared with lm-evaluation-harness's HF model on the same cores.

    python benchmarks/likelihood.py --model=DIR --source=file:FOLDER --tasks=arc_easy,piqa --questions=200

FOLDER holds the tasks' files, as for `file:` sources. Both programs score the same options of the same questions in
float32, each in its own process. Seconds exclude loading; memory is the peak of the process, above what it had after
loading and in total. lm_eval runs with each batch size of --batch_sizes, and the fastest is compared. Prints a Markdown
table, the largest relative difference of log-likelihoods, and the number of questions for which `acc` or `acc_norm`
differ.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

_MODEL = flags.DEFINE_string("model", "tiny", "A checkpoint folder or hub id.")
_TASKS = flags.DEFINE_list("tasks", ["arc_easy"], "Multiple-choice tasks.")
_SOURCE = flags.DEFINE_string("source", "", "Source of all tasks; empty for the published ones.")
_QUESTIONS = flags.DEFINE_integer("questions", 200, "Questions per task.", lower_bound=1)
_BATCHES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Batch sizes of lm_eval.")
_CORES = flags.DEFINE_integer("cores", 2, "Number of cores that processes are pinned to.", lower_bound=1)
_CHILD = flags.DEFINE_string("child", None, "Internal: `ours`, or a batch size of lm_eval.")


def load_questions() -> dict[str, Any]:
  """Loads the questions of each task."""
  from imm_jax import tasks

  return {name: tasks.load_choices(name, source=_SOURCE.value)[:_QUESTIONS.value] for name in _TASKS.value}


def pairs(choices: Any) -> list[tuple[str, str]]:
  """Returns (context, option) for each option."""
  return [(c.contexts[i % len(c.contexts)], option) for c in choices for i, option in enumerate(c.options)]


def child() -> None:
  """Scores with one program and prints seconds, memory and log-likelihoods by task as JSON."""
  questions = load_questions()
  if _CHILD.value == "ours":
    from imm_jax.model import hub, sharding
    from imm_jax.model.tokenizer import load_tokenizer
    from imm_jax.scoring import Scorer, encode_continuations

    folder = hub.resolve(_MODEL.value)
    scorer = Scorer.load(folder, mesh=sharding.make_mesh(data=1, fsdp=1), compute_dtype="float32")
    tokenizer = load_tokenizer(folder)
    score = lambda of: [s.logprob for s in scorer.score(encode_continuations(
        tokenizer, of, rows=scorer.config.vocab_size, positions=scorer.config.max_positions), quiet=True)]
  else:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from imm_jax.model import hub

    torch.set_num_threads(_CORES.value)
    model = HFLM(pretrained=str(hub.resolve(_MODEL.value)), dtype="float32", device="cpu",
                 batch_size=int(_CHILD.value))
    score = lambda of: [float(p) for p, _ in model.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(of)], disable_tqdm=True)]
  loaded, logprobs, seconds = _resident(), {}, {}
  peak = _Peak()
  for name, choices in questions.items():
    start = time.perf_counter()
    logprobs[name] = score(pairs(choices))
    seconds[name] = time.perf_counter() - start
  highest = peak.stop()
  print(json.dumps({"seconds": seconds, "extra": (highest - loaded) / 2**30, "peak": highest / 2**30,
                    "logprobs": logprobs}))


def _resident() -> int:
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon:"):
      return int(line.split()[1]) * 1024
  raise RuntimeError("no RssAnon in /proc/self/status")


class _Peak:
  """Tracks the peak of anonymous memory, polled every 20 ms."""

  def __init__(self):
    self._peak, self._stopped = 0, threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()

  def _watch(self) -> None:
    while not self._stopped.wait(0.02):
      self._peak = max(self._peak, _resident())

  def stop(self) -> int:
    self._stopped.set()
    self._thread.join()
    return self._peak


def run(program: str) -> dict[str, Any]:
  """Runs a program in a child process and returns the JSON that it prints."""
  cores = sorted(os.sched_getaffinity(0))[:_CORES.value]
  command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, __file__, f"--child={program}",
             *(f"--{flag.name}={','.join(flag.value) if isinstance(flag.value, list) else flag.value}"
               for flag in (_MODEL, _TASKS, _SOURCE, _QUESTIONS, _CORES))]
  process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True,
                           env=os.environ | {"OMP_NUM_THREADS": str(_CORES.value), "TQDM_DISABLE": "1"})
  return json.loads(process.stdout.splitlines()[-1])


def main(_: list[str]) -> None:
  """Runs all programs, and prints the table and the differences."""
  if _CHILD.value:
    return child()
  questions = load_questions()
  ours = run("ours")
  theirs = {batch: run(batch) for batch in _BATCHES.value}
  best = min(theirs, key=lambda batch: sum(theirs[batch]["seconds"].values()))
  print("| program | " + " | ".join(f"{name}, s" for name in questions) + " | all, s | scoring, GiB | in all, GiB |")
  print("|---" * (len(questions) + 4) + "|")
  for label, result in (("imm_jax", ours), *((f"lm_eval hf, batch {batch}", r) for batch, r in theirs.items())):
    print(f"| {label} | " + " | ".join(f"{s:.1f}" for s in result["seconds"].values())
          + f" | {sum(result['seconds'].values()):.1f} | {result['extra']:.2f} | {result['peak']:.2f} |")
  ratio = sum(theirs[best]["seconds"].values()) / sum(ours["seconds"].values())
  print(f"\n{ratio:.2f} times as fast as lm_eval at its best batch size, {best}")
  for name, choices in questions.items():
    a, b = np.array(ours["logprobs"][name]), np.array(theirs[best]["logprobs"][name])
    wrong = {"acc": 0, "acc_norm": 0}
    right = {"acc": 0, "acc_norm": 0}
    at = 0
    for choice in choices:
      here = slice(at, at := at + len(choice.options))
      for metric, lengths in (("acc", 1.0), ("acc_norm", np.array([len(o) - 1 for o in choice.options]))):
        picks = [int(np.argmax(x[here] / lengths)) for x in (a, b)]
        wrong[metric] += (picks[0] == choice.gold) != (picks[1] == choice.gold)
        right[metric] += picks[0] == choice.gold
    print(f"{name}: {len(a)} options, largest relative difference {np.max(np.abs(a - b) / np.abs(b)):.1e}; "
          + "; ".join(f"{metric} {right[metric] / len(choices):.4f}, different for {wrong[metric]} of {len(choices)}"
                      for metric in wrong))
  return None


if __name__ == "__main__":
  app.run(main)
