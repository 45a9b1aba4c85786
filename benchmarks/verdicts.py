"""Accuracy and speed of verdicts on labelled model outputs.

    python benchmarks/verdicts.py --answers=FILE.jsonl.gz --workers=2

Reads JSON lines with `output`, `gold`, `correct` and `kind` (num, tex or mc); rows whose gold answer is not of their
kind are skipped. As a control, outputs labelled as right are judged against the different gold answers of other
questions (shuffled); none should be accepted. Prints a Markdown table.
"""

import gzip
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from imm_jax.tasks import answers, latex
from imm_jax.tasks.judge import Judge

_ANSWERS = flags.DEFINE_string("answers", None, "JSON lines, possibly gzipped.", required=True)
_WORKERS = flags.DEFINE_integer("workers", 2, "Worker processes.", lower_bound=1)
_STRICT = flags.DEFINE_bool("strict", False, "Judge as in filtering, where an answer needs a marker.")
_SHUFFLES = flags.DEFINE_integer("shuffles", 5, "Number of shuffles of the gold answers.", lower_bound=1)
_ERRORS = flags.DEFINE_bool("errors", False, "Print the verdicts that differ from their labels.")
KINDS = {"num": "number", "tex": "latex", "mc": "choice"}


def is_judgeable(row: dict[str, Any]) -> bool:
  """Returns whether a row's gold answer is of its kind."""
  return row["kind"] != "num" or answers.parse_number(row["gold"]) is not None


def are_different(a: str, b: str, kind: str) -> bool:
  """Returns whether two gold answers have different values."""
  if kind == "number":
    return abs(answers.parse_number(a) - answers.parse_number(b)) > answers.TOLERANCE
  return latex.normalize(a) != latex.normalize(b) and latex.compare_spelling(a, b) is not True


def measure(judge: Judge, rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
  """Judges rows of a kind; returns the cells of a row of the table."""
  items = [(r["output"], r["gold"], kind) for r in rows]
  judge.verdicts(items[:50], strict=_STRICT.value)  # warm-up: starts the workers
  start = time.perf_counter()
  verdicts = judge.verdicts(items, strict=_STRICT.value)
  seconds = time.perf_counter() - start
  wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if v.correct != row["correct"]]
  if _ERRORS.value:
    for row, v in wrong:
      print(f"label {row['correct']}, gold {row['gold']!r}, span {v.span[:100]!r}: {row['output'][-200:]!r}")
  positives = sum(v.correct for _, v in wrong)
  golds, draw, shuffled = [r["gold"] for r in rows], random.Random(0), []
  for _ in range(_SHUFFLES.value):
    draw.shuffle(golds)
    shuffled += [(r["output"], gold, kind) for r, gold in zip(rows, golds, strict=True)
                 if r["correct"] and are_different(r["gold"], gold, kind)]
  verdicts = judge.verdicts(shuffled, strict=_STRICT.value)
  accepted = [item for item, v in zip(shuffled, verdicts, strict=True) if v.correct]
  if _ERRORS.value:
    for output, gold, _ in accepted:
      print(f"accepted for the gold answer {gold!r} of another question: {output[-200:]!r}")
  return [kind, f"{len(rows):,}", f"{100 * len(wrong) / len(rows):.3f}", str(positives), str(len(wrong) - positives),
          f"{len(rows) / seconds:,.0f}", f"{100 * len(accepted) / max(1, len(shuffled)):.3f} of {len(shuffled):,}"]


def main(_: Sequence[str]) -> None:
  open_file = gzip.open if _ANSWERS.value.endswith(".gz") else open
  with open_file(_ANSWERS.value, "rt", encoding="utf-8") as lines:
    rows = [row for row in map(json.loads, lines) if is_judgeable(row)]
  print("| kind | n | wrong % | false positives | false negatives | verdicts/s | shuffled accepted % |")
  print("|---|---|---|---|---|---|---|")
  with Judge(workers=_WORKERS.value) as judge:
    for name, kind in KINDS.items():
      selected = [r for r in rows if r["kind"] == name]
      if selected:
        print("| " + " | ".join(measure(judge, selected, kind)) + " |", flush=True)


if __name__ == "__main__":
  app.run(main)
