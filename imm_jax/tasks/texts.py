"""Loads passages of plain-text corpora, for layer importance."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator

from imm_jax.errors import UserError
from imm_jax.tasks import sources

# tfds:tiny_shakespeare is made from this file, but building it needs tensorflow.
CORPORA = {"tiny_shakespeare": "hf:Trelis/tiny-shakespeare", "bookcorpus": "hf:rojagtap/bookcorpus"}
_GUTENBERG = re.compile(r"\*\*\* ?START OF .*?\*\*\*(.*?)(?:\n\s*End of (?:the |)Project Gutenberg|\*\*\* ?END OF |\Z)",
                        re.DOTALL)


def load_text(name: str = "", *, count: int | None = None, source: str = "", split: str = "train",
              chars: int = 2000) -> list[str]:
  """Loads the first passages of a corpus in its own order.

  Consecutive paragraphs (of a file) or records are joined up to `chars` characters; a longer one is a passage of its
  own. The header and license of Project Gutenberg files are removed.

  Args:
    name: a name in `CORPORA`; not needed with a source.
    count: number of passages; None for all. A corpus of the hub is read only as far as needed.
    source: source in place of the corpus' own: a text file (`file:PATH.txt`), or records with a field `text`.
    split: split of the corpus.
    chars: maximum length of a joined passage in characters.

  Raises:
    UserError: for an unknown corpus, or a source that cannot be read or holds no text.
  """
  if not source and name not in CORPORA:
    raise UserError(f"corpus {name!r}: expected one of {', '.join(CORPORA)}, or a source such as file:PATH.txt")
  source = source or CORPORA[name]
  options = sources.ReadOptions(split, name, needs="with a field text, or a txt file", stream=True)
  passages = list(itertools.islice(_join_passages(_read_paragraphs(source, options), chars), count))
  if not passages:
    raise UserError(f"{source}: holds no text; expected more than white space")
  return passages


def _read_paragraphs(source: str, options: sources.ReadOptions) -> Iterator[tuple[str, str]]:
  """Yields (separator from the previous paragraph, paragraph)."""
  for location, record in sources.read(source, options):
    if "text" not in record:
      raise UserError(f"{location}: has no field 'text' but {', '.join(record)}; expected records {options.needs}")
    text = record["text"]
    if not isinstance(text, str):
      raise UserError(f"{location}: the field 'text' is {json.dumps(text, default=repr)[:50]}; expected a text")
    try:
      text.encode()  # fails for lone surrogates, which JSON can express
    except UnicodeEncodeError as e:
      raise UserError(f"{location}: the field 'text' is no valid text ({e})") from e
    body = _GUTENBERG.search(text)
    separator = "\n"
    for paragraph in re.split(r"\n\s*\n", body[1] if body else text):
      if paragraph.strip():
        yield separator, paragraph.strip()
        separator = "\n\n"


def _join_passages(paragraphs: Iterable[tuple[str, str]], chars: int) -> Iterator[str]:
  passage = ""
  for separator, paragraph in paragraphs:
    if passage and len(passage) + len(separator) + len(paragraph) > chars:
      yield passage
      passage = ""
    passage += separator + paragraph if passage else paragraph
  if passage:
    yield passage
