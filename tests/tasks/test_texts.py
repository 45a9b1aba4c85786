"""Passages of plain text."""

import itertools

import datasets
import pytest

from imm_jax import tasks
from imm_jax.errors import UserError
from imm_jax.tasks import texts


def test_paragraphs_are_joined(tmp_path):
  """They are joined up to a length, and none is lost."""
  paragraphs = [f"Paragraph {i}. " + "word " * i + "end." for i in range(40)]
  (tmp_path / "a.txt").write_bytes("\r\n\r\n".join(paragraphs).encode())
  source = f"file:{tmp_path}/a.txt"
  passages = tasks.load_text(source=source, chars=300)
  assert "\n\n".join(passages).split("\n\n") == paragraphs
  assert max(map(len, passages)) <= 300
  assert all(len(a) + len(b) > 150 for a, b in itertools.pairwise(passages))
  assert tasks.load_text(source=source, chars=300, count=3) == passages[:3]
  assert tasks.load_text(source=source, chars=50)[-1] == paragraphs[-1]  # longer than 50: alone and whole


def test_gutenberg_frame_is_left_out(tmp_path):
  """What Project Gutenberg puts around a book is no part of it."""
  (tmp_path / "a.txt").write_text("The licence.\n*** START OF THIS BOOK X ***\n\nChapter I\n\nOnce.\n\n"
                                  "*** END OF THIS BOOK X ***\nMore licence.")
  assert tasks.load_text(source=f"file:{tmp_path}/a.txt") == ["Chapter I\n\nOnce."]


def test_hub_corpus_is_read_lazily(monkeypatch):
  """It is read no further than needed."""
  asked = {}

  def rows():
    for i in range(7):
      yield {"text": f"sentence {i} ."}
    pytest.fail("read on")

  monkeypatch.setattr(datasets, "load_dataset",
                      lambda name, *_, **options: asked.update(name=name, **options) or rows())
  assert tasks.load_text("bookcorpus", count=2, chars=36) == [
      "sentence 0 .\nsentence 1 .", "sentence 2 .\nsentence 3 ."]
  assert asked == {"name": texts.CORPORA["bookcorpus"].removeprefix("hf:"), "split": "train", "revision": None,
                   "streaming": True}


def test_what_is_no_corpus_says_so(tmp_path):
  with pytest.raises(UserError, match="corpus 'books': expected one of tiny_shakespeare, bookcorpus, or a source"):
    tasks.load_text("books")
  (tmp_path / "a.jsonl").write_text('{"body": "x"}')
  with pytest.raises(UserError, match=r"a.jsonl:1: has no field 'text' but body"):
    tasks.load_text(source=f"file:{tmp_path}/a.jsonl")
  (tmp_path / "a.txt").write_text(" \n\n ")
  with pytest.raises(UserError, match="holds no text"):
    tasks.load_text(source=f"file:{tmp_path}/a.txt")
