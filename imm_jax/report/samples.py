"""The answers of a run, packed for the page's browser of samples.

Each file becomes chunks of some thousand answers: gzip of JSON with the questions once and the answers as rows. The
page unpacks them when a reader gets there.
"""

import base64
import gzip
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax.errors import listed
from imm_jax.report.reading import count, is_number
from imm_jax.report.results import Results

# Bytes of the files whose answers the page holds; a browser keeps about as much in memory.
MOST_BYTES = 150_000_000
_ROWS = 20_000  # of a chunk
# What a line has to hold.
_ROW = {"id": str, "question": str, "gold": str, "text": str, "span": str, "correct": bool, "tokens": int,
        "finish": str}


class Chunk(NamedTuple):
  """Answers of one file.

  Attributes:
    name: the file, relative to the run directory.
    rows: how many.
    right: how many of them are.
    tokens: of all answers.
    damaged: lines that are no JSON object, by number.
    lacking: lines in which something is missing or of a wrong kind, by number; they are shown without it.
    packed: base64 of gzip of JSON: `run`, `kind`, `round`, `task`, `questions` ([id, question, gold]) and `rows`
      ([number of the question, sample, temperature, right, cut off, span, text]).
  """

  name: str
  rows: int
  right: int
  tokens: int
  damaged: tuple[int, ...]
  lacking: tuple[int, ...]
  packed: str


class Packer:
  """Packs the files of a run, and remembers those that have not changed since.

  Args:
    run: what the run is called, where a page has several.
  """

  def __init__(self, run: str = "") -> None:
    self._run = run
    self.size = 0  # bytes of the files in the last chunks
    self._known: dict[Path, tuple[tuple[int, int], list[Chunk]]] = {}

  def chunks(self, results: Results, *, most_bytes: int = MOST_BYTES) -> tuple[list[Chunk], list[str]]:
    """The chunks of a run, and what is missing or left out, a line each.

    What was trained on comes first, then greedy answers of evaluation, then samples of evaluation; what would take the
    page past `most_bytes` is left out.
    """
    found, problems, left, expected = [], [], most_bytes, _expected(results)
    self.size = 0
    for path, kind, round_, task in _files(results, problems):
      name = str(path.relative_to(results.root))
      try:
        status = path.stat()
      except OSError as e:  # a run that goes on may make it again just now
        problems.append(f"{name}: cannot be read ({e.strerror})")
        continue
      if status.st_size > left:
        problems.append(f"{name}: not in the browser of samples, which holds {most_bytes:,} bytes of answers at most")
        continue
      left -= status.st_size
      self.size += status.st_size
      stamp = (status.st_mtime_ns, status.st_size)
      if self._known.get(path, (None,))[0] != stamp:
        about = {"run": self._run, "kind": kind, "round": round_, "task": task}
        self._known[path] = stamp, list(_pack(path, name, about))
      found += self._known[path][1]
      for which, said in (("damaged", "that are no JSON object were left out"),
                          ("lacking", f"in which one of {', '.join(_ROW)} is missing or damaged")):
        lines = [str(number) for chunk in self._known[path][1] for number in getattr(chunk, which)]
        problems += [f"{name}: lines {said}: {listed(lines)}"] * bool(lines)
      counts = tuple(sum(getattr(chunk, which) for chunk in self._known[path][1]) for which in ("rows", "right"))
      if counts != expected.get(name, counts):
        problems.append("{}: {:,} answers, {:,} of them right; by run.json {:,}, {:,} of them right".format(
            name, *counts, *expected[name]))
    return found, problems


def _expected(results: Results) -> dict[str, tuple[int, int]]:
  """How many answers a file holds, and how many of them are right, by the scores and counts of run.json."""
  found = {f"round_{row['round']}/samples.jsonl": (count(row, "samples"), count(row, "correct"))
           for row in results.data if "samples" in row}
  for model in results.models:
    found |= {f"{model.folder}/{task}.jsonl": (a.n, round(a.value * a.n)) for task, a in model.scores.items()}
  return found


def _files(results: Results, problems: list[str]) -> Iterable[tuple[Path, str, int, str]]:
  """(file, kind, round, task) of every file of answers whose stage is done."""
  greedy, drawn = [], []
  matches = [match for name in results.stages
             if (match := re.fullmatch(r"(?:round_(\d+)|base)/(samples\.jsonl|eval(?:/(.+))?)", name))]
  for match in sorted(matches, key=lambda match: (int(match[1] or -1), match[0])):
    name, round_ = match[0], int(match[1] or -1)
    path = results.root / name
    if not path.exists():
      continue  # that it is missing was said before
    if path.is_file():
      yield path, "training samples", round_, results.id_task
      continue
    model = (match[3] or "base").replace("sweep_", "merged ")
    for task in (results.id_task, *results.ood_tasks):
      if (path / f"{task}.jsonl").is_file():
        greedy.append((path / f"{task}.jsonl", f"evaluation: {model}", round_, task))
      else:
        problems.append(f"{name}/{task}.jsonl: missing")
      if (path / f"{task}_samples.jsonl").is_file():
        drawn.append((path / f"{task}_samples.jsonl", f"evaluation: {model}, samples", round_, task))
  yield from (*greedy, *drawn)


def _pack(path: Path, name: str, about: dict[str, Any]) -> Iterable[Chunk]:
  with path.open("rb") as f:
    lines = enumerate(f, 1)
    while some := list(itertools.islice(lines, _ROWS)):
      yield _pack_lines(some, name, about)


def _pack_lines(lines: Iterable[tuple[int, bytes]], name: str, about: dict[str, Any]) -> Chunk:
  questions: dict[tuple[str, str, str], int] = {}
  rows, tokens, damaged, lacking = [], 0, [], []
  for number, line in lines:
    try:
      row = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
      row = None
    if not isinstance(row, dict):
      damaged.append(number)
      continue
    if not all(isinstance(row.get(key), kind) for key, kind in _ROW.items()):
      lacking.append(number)
    question = (_text(row, "id"), _text(row, "question"), _text(row, "gold"))
    rows.append([questions.setdefault(question, len(questions)), _number(row, "sample"), _number(row, "temperature"),
                 int(row.get("correct") is True), int(row.get("finish") == "length"), _text(row, "span"),
                 _text(row, "text")])
    tokens += int(_number(row, "tokens") or 0)
  # As ASCII, in which lone surrogates of a model's output survive; JSON has no NaN.
  found = json.dumps(about | {"questions": list(questions), "rows": rows}, allow_nan=False, separators=(",", ":"))
  packed = base64.b64encode(gzip.compress(found.encode("ascii"), compresslevel=3, mtime=0)).decode()
  return Chunk(name, len(rows), sum(row[3] for row in rows), tokens, tuple(damaged), tuple(lacking), packed)


def _text(row: dict[str, Any], key: str) -> str:
  value = row.get(key)
  return value if isinstance(value, str) else ""


def _number(row: dict[str, Any], key: str) -> float | None:
  value = row.get(key)
  return value if is_number(value) else None
