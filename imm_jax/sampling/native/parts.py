"""The native sampler in parts, each of which is kept when it is done: a run that was killed goes on after the last."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imm_jax import distributed
from imm_jax.sampling import Completion, Prompt
from imm_jax.sampling.journal import Journal

# Samples of a part for each row of the decoder: rows stand empty at the end of every part, and only one can be lost.
_ROUNDS = 4


def generate(sampler: Callable[..., list[list[Completion]]], prompts: Sequence[Prompt], *, journal: Path | None,
             model: str, rows: int, label: str, num_samples: int = 1, **options: Any) -> list[list[Completion]]:
  """`NativeSampler.generate` over all processes, each of which has a share of the prompts.

  Which prompts run together does not depend on what is done already, so the samples have the same bits.

  Args:
    sampler: `NativeSampler.generate`.
    prompts: the same in every process.
    journal: a file that gets the samples, a part at a time; a call with the same arguments goes on from it. None
      keeps nothing.
    model: the digest of the model's folder and the compute dtype, which decide the samples too; of process 0.
    rows: samples that are decoded at once.
    label: what the progress bar says.
    num_samples: of each prompt.
    **options: of `NativeSampler.generate`.

  Returns:
    For each prompt, in order, its completions; they count on process 0 alone.
  """
  size = max(1, _ROUNDS * rows * distributed.count() // num_samples)
  asked = hashlib.sha256(json.dumps([tuple(p) for p in prompts]).encode()).hexdigest()
  settings = {"parts": 1, "size": size, "model": model, "questions": asked, "num_samples": num_samples, **options}
  result: list[list[Completion]] = []
  with contextlib.ExitStack() as stack:
    keeps = journal is not None and distributed.is_main()
    kept = stack.enter_context(contextlib.closing(Journal(journal, settings))) if keeps else None
    done = set(distributed.from_main(sorted(kept.done) if kept else []))
    count = -(-len(prompts) // size)
    for number, begin in enumerate(range(0, len(prompts), size), 1):
      part = prompts[begin:begin + size]
      numbers = range(begin, begin + len(part))
      if done.issuperset(numbers):
        result += [kept.done[i] for i in numbers] if kept else [[] for _ in numbers]
        continue
      found = distributed.gather(sampler(list(distributed.share(part)), num_samples=num_samples, **options,
                                         label=f"{label} ({number} of {count})" if count > 1 else label))
      groups = [[Completion(*completion) for completion in group] for group in found]
      if kept:
        for i, group in zip(numbers, groups, strict=True):
          kept.add(i, group)
      result += groups
  return result
