"""Native sampling in parts that are saved when done, so that a killed run resumes after the last one."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.runtime import distributed
from imm_jax.sampling import Completion, Prompt
from imm_jax.sampling.journal import Journal

# Samples per decoder row in a part: fewer lose less work to a kill, more leave rows idle less often (at a part's end).
_ROUNDS = 4


def generate(sampler: Callable[..., list[list[Completion]]], prompts: Sequence[Prompt], *, journal: Path | None,
             model: str, rows: int, label: str, num_samples: int = 1, **options: Any) -> list[list[Completion]]:
  """Runs `NativeSampler.generate` over all processes, each with a share of the prompts.

  Which prompts run together does not depend on what is already done, so that samples are bitwise reproducible.

  Args:
    sampler: `NativeSampler.generate`.
    prompts: prompts, the same in every process.
    journal: file that samples are written to, a part at a time; a call with the same arguments resumes from it. None
      saves nothing.
    model: digest of the model's folder and compute dtype, which also determine the samples; used on process 0.
    rows: number of samples decoded at once.
    label: text of the progress bar.
    num_samples: completions per prompt.
    **options: other arguments of `NativeSampler.generate`.

  Returns:
    The completions of each prompt, in order; valid only on process 0.
  """
  size = max(1, _ROUNDS * rows * distributed.count_processes() // num_samples)
  digest = files.digest_json([tuple(p) for p in prompts])
  settings = {"parts": 1, "size": size, "model": model, "questions": digest, "num_samples": num_samples, **options}
  result: list[list[Completion]] = []
  with contextlib.ExitStack() as stack:
    saves = journal is not None and distributed.is_main()
    saved = stack.enter_context(contextlib.closing(Journal(journal, settings))) if saves else None
    done = set(distributed.broadcast(sorted(saved.done) if saved else []))
    count = -(-len(prompts) // size)
    for number, begin in enumerate(range(0, len(prompts), size), 1):
      part = prompts[begin:begin + size]
      numbers = range(begin, begin + len(part))
      if done.issuperset(numbers):
        result += [saved.done[i] for i in numbers] if saved else [[] for _ in numbers]
        continue
      gathered = distributed.gather(sampler(list(distributed.take_share(part)), num_samples=num_samples, **options,
                                            label=f"{label} ({number} of {count})" if count > 1 else label))
      groups = [[Completion(*completion) for completion in group] for group in gathered]
      if saved:
        for i, group in zip(numbers, groups, strict=True):
          saved.add(i, group)
      result += groups
  return result
