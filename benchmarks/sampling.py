"""The native sampler compared with vLLM and transformers: greedy, float32, same cores, one interleaved run.

    python benchmarks/sampling.py --model=FOLDER --svamp=file:SVAMP.json --gsm8k=file:DIR --vllm_python=PYTHON

There are two workloads of real questions: `svamp` without and `gsm8k` with eight worked examples. The programs are
long-lived processes pinned to the same cores. Each warms up on the first questions (compilation); then they alternate
over the same slices of the questions, and idle ones are stopped with SIGSTOP. Prints tokens/s by wall-clock time and,
as others may load the machine, by CPU time (summed over cores), peak memory, and the number of equal texts; then how
many tokens of prompts the native sampler computes. vLLM is left out without --vllm_python, transformers with
--transformers_questions=0; transformers gets only the first questions.

`stories` asks questions of the embedded model and needs no files.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

_MODEL = flags.DEFINE_string("model", "tiny", "An HF checkpoint folder or hub id.")
_WORKLOADS = flags.DEFINE_list("workloads", ["svamp", "gsm8k"], "Workloads: svamp, gsm8k, stories.")
_SVAMP = flags.DEFINE_string("svamp", "", "Source of SVAMP; empty for the published one.")
_GSM8K = flags.DEFINE_string("gsm8k", "", "Source of GSM8K.")
_QUESTIONS = flags.DEFINE_list("questions", ["256", "128"], "Number of questions of each workload.")
_SLICE = flags.DEFINE_integer("slice", 128, "Questions per turn.", lower_bound=1)
_NEW = flags.DEFINE_integer("max_new_tokens", 200, "Maximum tokens per answer.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 64, "Batch size of the native sampler.", lower_bound=1)
_PEER_ROWS = flags.DEFINE_integer("peer_rows", 32, "Batch size of the others.", lower_bound=1)
_DTYPE = flags.DEFINE_string("dtype", "float32", "Compute dtype.")
_VLLM = flags.DEFINE_string("vllm_python", "", "The python of an environment with vLLM.")
_PEER = flags.DEFINE_integer("transformers_questions", 32, "Number of questions for transformers.")
_CORES = flags.DEFINE_integer("cores", 2, "Number of cores that processes are pinned to.", lower_bound=1)
_CHILD = flags.DEFINE_string("child", None, "Internal: program,work file,descriptor.")
SHOTS = 8
# vLLM's CPU build needs these to run seeded requests, and fast (max_num_batched_tokens fits eight long prompts).
ENGINE = {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False, "max_num_batched_tokens": 8192,
          "max_model_len": 4096, "disable_log_stats": True}


def workload(name: str, count: int, tokenizer: Any, vocab: int) -> list[list[int]]:
  """Returns the token ids of a workload's prompts."""
  from imm_jax import tasks
  from imm_jax.sampling import Prompt, completions
  from imm_jax.tasks import prompts

  source = {"svamp": _SVAMP.value, "gsm8k": _GSM8K.value}.get(name, "")
  load = lambda split, count: tasks.load(name, split=split, count=count, seed=0, source=source)
  shots = load("train", SHOTS) if name == "gsm8k" else ()
  asked = [Prompt(e.id, prompts.build_prompt(e.question, examples=shots)) for e in load("test", count)]
  return completions.encode(tokenizer, asked, vocab)


def count_prefill(ids: list[list[int]], rows: int, new_tokens: int) -> str:
  """Counts what the native sampler computes and stores of prompts on a CPU, with and without shared prefixes."""
  from imm_jax.sampling.native import queue

  def count(groups: list[list[int]], shared: bool) -> tuple[int, int]:
    computed, slots = [0], [0]
    for group in groups:
      prefix = queue.common_prefix([ids[i] for i in group], len(group)) if shared else 0
      suffixes = {i: ids[i][prefix:] for i in group}
      waiting = queue.Queue(suffixes, [queue.Sample(i, 0, "", 0.0) for i in group],
                            queue.pack_shape([*map(len, suffixes.values())]),
                            lambda pack: computed.append(pack.tokens.size) or (None, []))
      computed.append(queue.round_up_slots(prefix) if prefix else 0)
      while waiting:
        waiting.take(rows)
      slots.append(rows * queue.compute_max_slots(max(map(len, suffixes.values())) + new_tokens)
                   + (queue.round_up_prefix(prefix) if prefix else 0))
    return sum(computed), max(slots)

  tokens, slots = count(queue.group_by_prefix(ids, least=rows), True)
  without, slots_without = count([[*range(len(ids))]], False)
  return (f"{sum(map(len, ids))} tokens of prompts: {tokens} are computed with padding ({without} without shared "
          f"prefixes), and {rows} rows with {new_tokens} new tokens have {slots} slots of cache ({slots_without})")


def native(work: dict[str, Any]):
  """Returns a function from token ids to (number of tokens, text) of each answer."""
  from imm_jax.runtime import compilation
  from imm_jax.sampling import Prompt
  from imm_jax.sampling.native import NativeSampler

  compilation.enable_cache()
  sampler = NativeSampler(work["model"], compute_dtype=work["dtype"], batch_size=work["rows"])

  def run(ids: list[list[int]]) -> list[tuple[int, str]]:
    asked = [Prompt(str(i), "", tuple(row)) for i, row in enumerate(ids)]
    done = sampler.generate(asked, max_new_tokens=work["max_tokens"], quiet=True)
    return [(c.num_tokens, c.text) for c, in done]

  return run


def transformers(work: dict[str, Any]):
  """Returns a function from token ids to each answer's tokens, by transformers with left-padded batches."""
  import torch
  import transformers as library

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = library.AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"])).eval()

  def run(ids: list[list[int]]) -> list[list[int]]:
    rows = []
    for begin in range(0, len(ids), work["peer_rows"]):
      batch = ids[begin:begin + work["peer_rows"]]
      length = max(map(len, batch))
      tokens = torch.tensor([[0] * (length - len(p)) + p for p in batch])
      mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch])
      with torch.no_grad():
        out = model.generate(input_ids=tokens, attention_mask=mask, pad_token_id=work["ends"][0], do_sample=False,
                             max_new_tokens=work["max_tokens"], eos_token_id=work["ends"])
      rows += out[:, length:].tolist()
    return rows

  return run


class Program:
  """Controls a process that answers slices of the questions."""

  def __init__(self, name: str, work: Path):
    """Starts the process in a new session, and stops it once it has loaded."""
    reads, writes = os.pipe()
    flag = f"{name},{work},{writes}"
    command = [sys.executable, __file__, *sys.argv[1:], f"--child={flag}"]
    environment = dict(os.environ)
    if name == "vLLM":
      from imm_jax.sampling.vllm.server import environment as without_jax
      command = [_VLLM.value, str(Path(__file__).with_name("vllm_offline.py")), str(work), str(writes)]
      environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **without_jax(_VLLM.value, os.environ)}
    self.name, self._log = name, work.with_name(f"{name}.log").open("w")
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
                                     pass_fds=[writes], start_new_session=True, env=environment)
    os.close(writes)
    self._replies = os.fdopen(reads)
    self.ask([0, 0])  # returns once it has loaded
    self._signal(signal.SIGSTOP)

  def ask(self, span: list[int]) -> list:
    """Returns the answers to the questions of a span."""
    self._process.stdin.write(f"{json.dumps(span)}\n".encode())
    self._process.stdin.flush()
    line = self._replies.readline()
    if not line:
      sys.exit(f"{self.name} ended: see {self._log.name}\n{Path(self._log.name).read_text()[-2000:]}")
    return json.loads(line)

  def turn(self, span: list[int]) -> tuple[list, float, float]:
    """Lets the process run; returns the answers, wall-clock seconds and CPU seconds."""
    self._signal(signal.SIGCONT)
    clock, cpu = time.perf_counter(), self._used()
    answers = self.ask(span)
    clock, cpu = time.perf_counter() - clock, self._used() - cpu
    self._signal(signal.SIGSTOP)
    return answers, clock, cpu

  def _used(self) -> float:
    ticks = sum(sum(map(int, fields[11:15])) for fields in self._stats())
    return ticks / os.sysconf("SC_CLK_TCK")

  def memory(self) -> float:
    """Returns the sum of the peak memories of its processes in GiB."""
    result = 0
    for fields in self._stats():
      status = Path(f"/proc/{fields[-1]}/status").read_text()
      result += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return result / 2**20

  def _stats(self) -> list[list[str]]:
    """Returns the fields of /proc/PID/stat of its processes from the state on, and the id."""
    result = []
    for path in Path("/proc").glob("[0-9]*/stat"):
      try:
        fields = path.read_text().rpartition(")")[2].split()
      except OSError:
        continue
      if int(fields[3]) == self._process.pid:
        result.append([*fields, path.parent.name])
    return result

  def _signal(self, number: int) -> None:
    os.killpg(self._process.pid, number)

  def close(self) -> None:
    """Kills the processes."""
    self._signal(signal.SIGCONT)
    self._signal(signal.SIGKILL)
    self._process.wait()


def child(name: str, work: Path, descriptor: int) -> None:
  """Answers spans of questions that are read from stdin."""
  settings = json.loads(work.read_text())
  run = {"native": native, "transformers": transformers}[name](settings)
  with os.fdopen(descriptor, "w") as replies:
    for line in sys.stdin:
      begin, end = json.loads(line)
      replies.write(json.dumps(run(settings["ids"][begin:end]) if end > begin else []) + "\n")
      replies.flush()


def main(_: list[str]) -> None:
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES.value])  # and all children
  if _CHILD.value:
    name, work, descriptor = _CHILD.value.split(",")
    child(name, Path(work), int(descriptor))
    return
  import tempfile

  from imm_jax.model import hf, hub
  from imm_jax.sampling import completions

  folder = hub.resolve(_MODEL.value)
  vocab = hf.read_config(folder).vocab_size
  tokenizer, eos = completions.load(folder, vocab)
  print("| workload | program | questions | tokens | s | tokens/s | processor s | tokens a processor s | GiB "
        "| texts as native's |\n|---|---|---|---|---|---|---|---|---|---|", flush=True)
  notes = []
  with tempfile.TemporaryDirectory() as scratch:
    for name, count in zip(_WORKLOADS.value, map(int, _QUESTIONS.value), strict=False):
      ids = workload(name, count, tokenizer, vocab)
      notes.append(f"{name}: {count_prefill(ids, _ROWS.value, _NEW.value)}")
      work = Path(scratch) / f"{name}.json"
      work.write_text(json.dumps({
          "model": str(folder), "dtype": _DTYPE.value, "ids": ids, "ends": list(eos), "max_tokens": _NEW.value,
          "rows": _ROWS.value, "peer_rows": _PEER_ROWS.value,
          "engine": {**ENGINE, "max_num_seqs": _PEER_ROWS.value}}))
      _measure(name, ids, work, lambda row: _answer(row, tokenizer, eos))
  print("", *notes, sep="\n")


def _answer(row: list, tokenizer: Any, eos: tuple[int, ...]) -> tuple[int, str]:
  """Returns (number of tokens, text) of a row, which is that already or the drawn tokens."""
  from imm_jax.sampling import completions

  if len(row) == 2 and isinstance(row[1], str):
    return row[0], row[1]
  done = completions.completion(tokenizer, np.array(row), eos, ())
  return done.num_tokens, done.text


def _measure(name: str, ids: list[list[int]], work: Path, answer: Any) -> None:
  """Runs all programs in turns, and prints a row for each."""
  limits = {"native": len(ids)} | ({"vLLM": len(ids)} if _VLLM.value else {}) | (
      {"transformers": min(_PEER.value, len(ids))} if _PEER.value else {})
  programs = []
  try:
    for program in limits:
      programs.append(Program(program, work))
    totals = {p.name: [0, 0.0, 0.0, []] for p in programs}
    for p in programs:  # warm-up: compilation and allocation
      if p.name != "transformers":  # does not compile
        p.turn([0, min(_SLICE.value, limits[p.name])])
    for begin in range(0, len(ids), _SLICE.value):
      for p in programs:
        end = min(begin + _SLICE.value, limits[p.name])
        if end > begin:
          rows, clock, cpu = p.turn([begin, end])
          answers = [answer(row) for row in rows]
          total = totals[p.name]
          total[0] += sum(tokens for tokens, _ in answers)
          total[1] += clock
          total[2] += cpu
          total[3] += [text for _, text in answers]
    for p in programs:
      tokens, clock, cpu, texts = totals[p.name]
      same = sum(a == b for a, b in zip(texts, totals["native"][3], strict=False))
      print(f"| {name} | {p.name} | {len(texts)} | {tokens} | {clock:.1f} | {tokens / clock:.0f} | {cpu:.1f} "
            f"| {tokens / cpu:.0f} | {p.memory():.2f} | {same} of {len(texts)} |", flush=True)
  finally:
    for p in programs:
      p.close()


if __name__ == "__main__":
  app.run(main)
