"""The native sampler in parts: a killed run resumes from its parts, with the same results."""

from pathlib import Path
from typing import Any

import pytest

from configs import tiny
from imm_jax.model import hub
from imm_jax.sampling import Completion, Prompt
from imm_jax.sampling.native import NativeSampler, parts
from imm_jax.stages import evaluate as evaluate_stage
from imm_jax.stages.result_cache import ResultCache

PROMPTS = [Prompt(f"q{i}", f"What is {i} + 1?") for i in range(37)]


class Sampler:
  """Answers prompts; simulates a kill after some calls."""

  def __init__(self, calls: int = 100):
    self.left, self.asked = calls, []

  def __call__(self, prompts: list[Prompt], *, num_samples: int, label: str, **_: Any) -> list[list[Completion]]:
    if not self.left:
      raise KeyboardInterrupt
    self.left -= 1
    self.asked.append((label, [p.id for p in prompts]))
    return [[Completion(f"{p.id}, {s}", s + 1, "stop") for s in range(num_samples)] for p in prompts]


def _run(path: Path, sampler: Sampler, **changes: Any) -> list[list[Completion]]:
  return parts.generate(sampler, PROMPTS, **{
      "journal": path, "model": "a", "rows": 4, "label": "eval", "num_samples": 2, "seed": 1} | changes)


def test_killed_run_resumes_after_whole_parts(tmp_path: Path) -> None:
  whole = Sampler()
  expected = _run(tmp_path / "whole", whole)
  assert [group[1].text for group in expected] == [f"{p.id}, 1" for p in PROMPTS]
  assert [(label, len(ids)) for label, ids in whole.asked] == [
      (f"eval ({i} of 5)", n) for i, n in enumerate((8, 8, 8, 8, 5), 1)]
  killed, path = Sampler(calls=3), tmp_path / "killed"
  with pytest.raises(KeyboardInterrupt):
    _run(path, killed)
  # An incomplete part is sampled again as a whole.
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[:-2]) + lines[-2][:9])
  again = Sampler()
  assert _run(path, again) == expected
  assert again.asked == whole.asked[2:]
  assert _run(path, Sampler(calls=0)) == expected  # all is there
  for changes in ({"model": "b"}, {"seed": 2}, {"num_samples": 1}, {"rows": 2}):
    other = Sampler()
    _run(path, other, **changes)
    assert other.asked


@pytest.mark.full
def test_killed_evaluation_keeps_its_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """A killed evaluation resumes to the same scores."""
  config = tiny.get_config()
  config.task.ood, config.task.eval_questions, config.eval.batch_size = ("groups",), 12, 2
  evaluate = lambda name: evaluate_stage.evaluate(config, hub.resolve("tiny"), tmp_path / "scratch",
                                                  ResultCache(tmp_path / name), label="tiny")
  expected, calls, own = evaluate("whole"), [], NativeSampler.generate
  for path in (tmp_path / "scratch").iterdir():
    path.unlink()

  def generate(self: NativeSampler, *args: Any, **options: Any) -> list[list[Completion]]:
    calls.append(options["label"])
    if len(calls) == 4:
      raise KeyboardInterrupt
    return own(self, *args, **options)

  monkeypatch.setattr(NativeSampler, "generate", generate)
  with pytest.raises(KeyboardInterrupt):
    evaluate("killed")
  assert evaluate("again") == expected
  assert calls == ["tiny: stories (1 of 2)", "tiny: stories (2 of 2)", "tiny: groups (1 of 2)",
                   "tiny: groups (2 of 2)", "tiny: groups (2 of 2)"]
  for name in ("stories", "groups"):
    assert (tmp_path / f"again/{name}.jsonl").read_bytes() == (tmp_path / f"whole/{name}.jsonl").read_bytes()
