"""One round of self-improvement in Python: sample, filter, fine-tune, merge with the base, measure.

    python examples/self_improvement.py

The embedded model answers word problems of one kind, keeps what is right, and trains on it. That helps there and harms
elsewhere; the merge with the base keeps most of the one and avoids most of the other. About a minute on 2 cores, most
of it compilation.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np

import imm_jax
from imm_jax.tasks import answers, prompts
from imm_jax.tasks.base import Example


def right_answers(model: imm_jax.Model, questions: list[Example]) -> np.ndarray:
  """Whether each greedy answer is right."""
  completions = model.sample([prompts.build_prompt(e.question) for e in questions], max_new_tokens=40, batch_size=200)
  return np.array([answers.verdict(c.text, e.answer, e.kind, strict=False).correct
                   for e, [c] in zip(questions, completions, strict=True)])


def main() -> None:
  base = imm_jax.load("tiny")
  print(base)

  # Sample an answer to each question (num_samples= gives more) and keep the right ones.
  questions = imm_jax.tasks.load("stories", split="train", count=800)
  asked = [prompts.build_prompt(e.question) for e in questions]
  drawn = base.sample(asked, temperature=0.4, max_new_tokens=40, batch_size=200)
  pairs = sorted({(prompt, c.text) for prompt, e, completions in zip(asked, questions, drawn, strict=True)
                  for c in completions if answers.verdict(c.text, e.answer, e.kind, strict=True).correct})
  print(f"{len(pairs)} different right answers of {sum(map(len, drawn))}")

  # Fine-tune on them.
  losses: list[float] = []
  tuned = imm_jax.fine_tune(base, pairs, learning_rate=1e-3, epochs=3, global_batch=20, row_length=192,
                            report=lambda step, loss, **_: losses.append(loss))
  print(f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")

  # Merge with the base (eq. 5 and 6); imm_jax.merging works on any pytree.
  merged = base.with_params(imm_jax.merging.imm(
      base.params, base.params, tuned.params, base_weight=0.4, drop_rate=0.2, key=jax.random.key(0), names=base.names))

  # Measure in domain and out of it; and how likely a worked answer is.
  stories, groups = (imm_jax.tasks.load(name, split="test", count=200) for name in ("stories", "groups"))
  worked = [(prompts.build_prompt(e.question), e.rationale) for e in stories]
  for name, model in (("base", base), ("tuned", tuned), ("merged", merged)):
    scores = model.score(worked)
    nats = -sum(s.logprob for s in scores) / sum(s.tokens for s in scores)
    in_domain, out_of_domain = np.split(right_answers(model, stories + groups), 2)
    print(f"{name:<8}stories {in_domain.mean():.3f}  groups {out_of_domain.mean():.3f}  {nats:.3f} nats a token")

  # Save it as an HF checkpoint, which transformers and vLLM read too.
  with tempfile.TemporaryDirectory() as folder:
    merged.save(Path(folder) / "merged")
    print(sorted(p.name for p in Path(folder, "merged").iterdir()))


if __name__ == "__main__":
  main()
