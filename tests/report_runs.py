"""Run directories for the tests of reports: the files of a finished run but for checkpoints, with made-up content."""

import html
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from imm_jax import files
from imm_jax.report import page, samples
from imm_jax.report.results import Results
from imm_jax.runs import status
from imm_jax.statistics import accuracy

OOD = ("groups", "choice")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# In place of what a model may write; none of it may become part of the page.
HOSTILE = ('<script>window.hacked = 1</script>', '</script><img src=x onerror="window.hacked = 1">',
           "a\u2028b\u2029c", "half a pair: \ud83d", "\u202eright to left", 'quotes " \' and & &amp; <b>bold</b>',
           "\x00\x07")


def make(root: Path, *, method: str = "imm", rounds: int = 2, questions: int = 6, samples: int = 3, seed: int = 0,
         model: str = "tiny", task: str = "stories", ood: Sequence[str] = OOD, intervention: str = "none",
         teacher: str = "") -> Path:
  """Writes a run directory; the text of sample s of question q is HOSTILE's, in turn, or made up."""
  rng = random.Random(seed)
  stages: dict[str, dict] = {}

  def stage(name: str, **facts: object) -> None:
    stages[name] = {"inputs": {}, "output": "0" * 64, "bytes": files.count_bytes(root / name),
                    "seconds": round(rng.uniform(1, 90), 2), "facts": facts}

  def evaluate(name: str) -> None:
    scores, how = {}, {}
    for one in (task, *ood):
      rows = [row(f"{one}/test/{q}", q, rng) for q in range(questions)]
      write_rows(root / name / f"{one}.jsonl", rows)
      right = sum(r["correct"] for r in rows)
      how[one] = {"name": "paper", "shots": 0, "n": questions, "mean_tokens": 10.0, "cut": 0.25}
      scores[one] = {"greedy": accuracy.compute_accuracy(right, questions)._asdict()}
      if one == task:
        scores[one] |= {f"pass@{k}": accuracy.compute_mean([min(1, 0.3 + 0.2 * k)] * questions)._asdict()
                        for k in (1, 2)}
        scores[one]["majority@2"] = accuracy.compute_accuracy(right, questions)._asdict()
    stage(name, scores=scores, protocol=how, long_prompts={})

  evaluate("base/eval")
  kinds = ("sft", "merged") if method in ("imm", "iimm") else ("sft",)
  for t in range(rounds):
    here = root / f"round_{t}"
    rows = [{**row(f"{task}/train/{t}/{q}", q, rng), "sample": s, "temperature": (0.2, 0.4, 0.6)[s % 3]}
            for q in range(questions) for s in range(samples)]
    for r, text in zip(rows, HOSTILE, strict=False):
      r["text"] = text
    write_rows(here / "samples.jsonl", rows)
    right = sum(r["correct"] for r in rows)
    stage(f"round_{t}/samples.jsonl", samples=len(rows), correct=right, tokens=10 * len(rows), unfinished=0,
          no_answer=0, long_prompts=0)
    write_rows(here / "train.jsonl", rows[:1])
    stage(f"round_{t}/train.jsonl", kept=right - 1, dropped_wrong=len(rows) - right, dropped_duplicate=1,
          dropped_unfinished=0, real=0, of_earlier_rounds=0)
    for kind in kinds:
      (here / kind).mkdir()
      stage(f"round_{t}/{kind}", **({"tokens": 5000, "dropped_long": 0} if kind == "sft" else {"base_weight": 0.5}))
      evaluate(f"round_{t}/eval/{kind}")
    (here / "analysis.json").write_text(json.dumps(analysis(rng, kinds)))
    stage(f"round_{t}/analysis.json")
  for t in range(rounds):
    (root / f"round_{t}/drift.json").write_text(json.dumps(drift(rng, kinds, (task, *ood))))
    stage(f"round_{t}/drift.json")
  config = {"method": method, "model": model, "teacher": teacher, "rounds": rounds, "seed": seed,
            "task": {"name": task, "ood": list(ood), "questions_per_round": 0, "eval_questions": 0},
            "sft": {"intervention": intervention, "epochs": 3}, "eval": {"num_samples": 2, "temperature": 0.6}}
  (root / "config.json").write_text(json.dumps(config))
  write_record(root, {"method": method, "tasks": {"id": task, "ood": list(ood)}, "devices": ["cpu"],
                      "versions": {"imm_jax": "0.1.0", "jax": "0.10.2"}, "stages": stages})
  write_rows(root / "metrics.jsonl", [{"stage": f"round_{t}/sft", "step": 0, "loss": 1.0, "memory_gib": 1.5 + t}
                                      for t in range(rounds)])
  return root


def row(name: str, q: int, rng: random.Random) -> dict:
  gold = 10 + q
  said = gold if rng.random() < 0.6 else gold + rng.randint(1, 9)
  return {"id": name, "question": f"Tom has {gold - 3} pens and buys 3. How many pens does Tom have, in case {q}?",
          "gold": str(gold), "kind": "number", "text": f"{gold - 3}+3={said}. The answer is {said}.", "tokens": 10,
          "finish": "stop", "correct": said == gold, "span": str(said)}


def analysis(rng: random.Random, kinds: Sequence[str]) -> dict:
  def by_module() -> dict[str, list[float]]:
    return {module: [rng.uniform(0.1, 1) for _ in range(4)] for module in MODULES}

  def layers(modules: dict[str, list[float]]) -> list[float]:
    return [sum(values) for values in zip(*modules.values(), strict=True)]

  importance, changes = by_module(), {}
  for kind in kinds:
    modules = by_module()
    total = layers(modules)
    changes[kind] = {"layers": total, "share": [x / sum(total) for x in total], "modules": modules}
  return {"importance": {"examples": 64, "order": 1, "layers": layers(importance), "modules": importance},
          "weight_change": changes, "spearman": -0.4,
          "diversity": {"questions": 6, "samples": 18, "distinct_answers": 1.7, "distinct_4grams": 0.5,
                        "token_entropy": None}}


def drift(rng: random.Random, kinds: Sequence[str], tasks: Sequence[str]) -> dict:
  made = lambda *keys: {key: rng.uniform(0.1, 1) for key in keys}
  return {"texts": {name: {"examples": 6, "tokens": 60, **made("loss", "entropy")} for name in tasks},
          "models": {kind: {name: made("kl", "loss", "entropy") for name in tasks} for kind in kinds}}


def write_rows(path: Path, rows: list[dict]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def read_record(root: Path) -> dict:
  return json.loads((root / "run.json").read_text())


def write_record(root: Path, record: dict) -> None:
  (root / "run.json").write_text(json.dumps(record))


def change(how: Callable[[dict], object]) -> Callable[[Path], None]:
  """A function that changes the run.json of a run directory."""
  def apply(root: Path) -> None:
    found = read_record(root)
    how(found)
    write_record(root, found)
  return apply


def text_of(page_: str) -> str:
  """What a reader sees of a page, about."""
  body = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page_, flags=re.DOTALL)
  return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def quick(root: Path) -> str:
  """The text of a run's page without its figures."""
  found = Results.read(root)
  chunks, problems = samples.Packer().chunks(found)
  return text_of(page.render(found, status.read(root), page.make_sections(found, chunks), chunks, problems, {}))
