"""Records of data sets as files, for the tests of how they are read."""

import json
from pathlib import Path
from typing import Any

from imm_jax.tasks import registry
from imm_jax.tasks.base import Example

CUSTOM = {"prompt": "P?", "gold": "1,600", "work": "So it is.", "opts": ["x", "y"]}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def parsed(tmp_path: Path, name: str, record: dict[str, Any], split: str = "test") -> Example:
  source = f"file:{write(tmp_path / 'one.jsonl', [record])}"
  example, = registry.read(name, split=split, source=source).examples
  return example


def gsm8k(question: str, gold: str = "3") -> dict[str, str]:
  return {"question": question, "answer": f"1+2=<<1+2={gold}>>{gold}.\n#### {gold}"}
