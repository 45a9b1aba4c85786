"""Packs the answers of a run for the page's sample browser.

Each file becomes chunks of some thousand answers: gzipped JSON with each question once and the answers as rows. The
page unpacks them on demand.
"""

import base64
import gzip
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from imm_jax.errors import join_items
from imm_jax.report.reading import is_number
from imm_jax.report.results import Results

# Maximum size of the files whose answers the page holds; a browser needs about as much memory.
MAX_BYTES = 150_000_000
_CHUNK_ROWS = 20_000  # in a chunk
# Required keys of a line and their types.
_ROW_TYPES = {"id": str, "question": str, "gold": str, "text": str, "span": str, "correct": bool, "tokens": int,
              "finish": str}


class Chunk(NamedTuple):
  """Holds the answers of one file.

  Attributes:
    name: name of the file, relative to the run directory.
    rows: number of answers.
    right: number of right answers.
    tokens: number of tokens of all answers.
    damaged: numbers of lines that are no JSON object.
    lacking: numbers of lines with missing or invalid keys, which are shown without these.
    packed: base64 of gzipped JSON: `run`, `kind`, `round`, `task`, `questions` ([id, question, gold]) and `rows`
      ([index of the question, sample, temperature, right, cut off, span, text]).
  """

  name: str
  rows: int
  right: int
  tokens: int
  damaged: tuple[int, ...]
  lacking: tuple[int, ...]
  packed: str


class Packer:
  """Packs the files of a run, and caches the result for files that do not change.

  Args:
    run: name of the run, if the page has several.
  """

  def __init__(self, run: str = "") -> None:
    self._run = run
    self.size = 0  # bytes of the files in the last chunks
    self._known: dict[Path, tuple[tuple[int, int], list[Chunk]]] = {}

  def chunks(self, results: Results, *, max_bytes: int = MAX_BYTES) -> tuple[list[Chunk], list[str]]:
    """Returns the chunks of a run, and descriptions of problems.

    Training samples come first, then greedy answers and samples of evaluation; files that would exceed `max_bytes` are
    left out.
    """
    chunks, problems, budget, expected = [], [], max_bytes, _expected_counts(results)
    self.size = 0
    for path, kind, round_, task in _list_files(results, problems):
      name = str(path.relative_to(results.root))
      try:
        status = path.stat()
      except OSError as e:  # a running run may be replacing it
        problems.append(f"{name}: cannot be read ({e.strerror})")
        continue
      if status.st_size > budget:
        problems.append(f"{name}: not in the browser of samples, which holds {max_bytes:,} bytes of answers at most")
        continue
      budget -= status.st_size
      self.size += status.st_size
      stamp = (status.st_mtime_ns, status.st_size)
      if self._known.get(path, (None,))[0] != stamp:
        metadata = {"run": self._run, "kind": kind, "round": round_, "task": task}
        self._known[path] = stamp, list(_pack(path, name, metadata))
      chunks += self._known[path][1]
      for field, description in (("damaged", "that are no JSON object were left out"),
                                 ("lacking", f"in which one of {', '.join(_ROW_TYPES)} is missing or damaged")):
        lines = [str(number) for chunk in self._known[path][1] for number in getattr(chunk, field)]
        problems += [f"{name}: lines {description}: {join_items(lines)}"] * bool(lines)
      counts = tuple(sum(getattr(chunk, field) for chunk in self._known[path][1]) for field in ("rows", "right"))
      if counts != expected.get(name, counts):
        problems.append("{}: {:,} answers, {:,} of them right; by run.json {:,}, {:,} of them right".format(
            name, *counts, *expected[name]))
    return chunks, problems


def _expected_counts(results: Results) -> dict[str, tuple[int, int]]:
  """Returns file -> (number of answers, number of right ones) according to run.json."""
  counts = {f"round_{row['round']}/samples.jsonl": (row["samples"], row["correct"])
           for row in results.data if "samples" in row}
  for model in results.models:
    counts |= {f"{model.folder}/{task}.jsonl": (a.n, round(a.value * a.n)) for task, a in model.scores.items()}
  return counts


def _list_files(results: Results, problems: list[str]) -> Iterable[tuple[Path, str, int, str]]:
  """Yields (file, kind, round, task) of every file of answers whose stage is finished."""
  greedy, drawn = [], []
  matches = [match for name in results.stages
             if (match := re.fullmatch(r"(?:round_(\d+)|base)/(samples\.jsonl|eval(?:/(.+))?)", name))]
  for match in sorted(matches, key=lambda match: (int(match[1] or -1), match[0])):
    name, round_ = match[0], int(match[1] or -1)
    path = results.root / name
    if not path.exists():
      continue  # already reported as missing
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


def _pack(path: Path, name: str, metadata: dict[str, Any]) -> Iterable[Chunk]:
  with path.open("rb") as f:
    lines = enumerate(f, 1)
    while chunk_lines := list(itertools.islice(lines, _CHUNK_ROWS)):
      yield _pack_lines(chunk_lines, name, metadata)


def _pack_lines(lines: Iterable[tuple[int, bytes]], name: str, metadata: dict[str, Any]) -> Chunk:
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
    if not all(isinstance(row.get(key), kind) for key, kind in _ROW_TYPES.items()):
      lacking.append(number)
    question = (_get_text(row, "id"), _get_text(row, "question"), _get_text(row, "gold"))
    rows.append([questions.setdefault(question, len(questions)), _get_number(row, "sample"),
                 _get_number(row, "temperature"), int(row.get("correct") is True), int(row.get("finish") == "length"),
                 _get_text(row, "span"), _get_text(row, "text")])
    tokens += int(_get_number(row, "tokens") or 0)
  # ASCII preserves lone surrogates in a model's output. JSON has no NaN.
  content = json.dumps(metadata | {"questions": list(questions), "rows": rows}, allow_nan=False, separators=(",", ":"))
  packed = base64.b64encode(gzip.compress(content.encode("ascii"), compresslevel=3, mtime=0)).decode()
  return Chunk(name, len(rows), sum(row[3] for row in rows), tokens, tuple(damaged), tuple(lacking), packed)


def _get_text(row: dict[str, Any], key: str) -> str:
  value = row.get(key)
  return value if isinstance(value, str) else ""


def _get_number(row: dict[str, Any], key: str) -> float | None:
  value = row.get(key)
  return value if is_number(value) else None
