"""Plain text for layer importance: passages of a corpus."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator

from imm_jax.errors import UserError
from imm_jax.tasks import sources

# The corpus of tfds (tfds:tiny_shakespeare) is cut from this file, but needs tensorflow to be built.
CORPORA = {"tiny_shakespeare": "hf:Trelis/tiny-shakespeare", "bookcorpus": "hf:rojagtap/bookcorpus"}
_GUTENBERG = re.compile(r"\*\*\* ?START OF .*?\*\*\*(.*?)(?:\n\s*End of (?:the |)Project Gutenberg|\*\*\* ?END OF |\Z)",
                        re.DOTALL)


def load_text(name: str = "", *, count: int | None = None, source: str = "", split: str = "train",
              chars: int = 2000) -> list[str]:
  """The first passages of a corpus, in its own order.

  Neighbouring paragraphs (of a file), or records, are joined up to `chars` characters; one that is longer stands alone.
  The header and licence of a Project Gutenberg file are left out.

  Args:
    name: of `CORPORA`; not needed with a source.
    count: how many; None for all. Of a corpus of the hub no more than they take is read.
    source: in place of the corpus' own: a text file (`file:PATH.txt`), or records with a field `text`.
    split: of the corpus.
    chars: the length of a passage, in characters.

  Raises:
    UserError: for an unknown corpus, or a source that cannot be read, or holds no text.
  """
  if not source and name not in CORPORA:
    raise UserError(f"corpus {name!r}: expected one of {', '.join(CORPORA)}, or a source such as file:PATH.txt")
  source = source or CORPORA[name]
  where = sources.Where(split, name, needs="with a field text, or a txt file", stream=True)
  passages = list(itertools.islice(_joined(_paragraphs(source, where), chars), count))
  if not passages:
    raise UserError(f"{source}: holds no text; expected more than white space")
  return passages


def _paragraphs(source: str, where: sources.Where) -> Iterator[tuple[str, str]]:
  """(what stands between it and the one before, paragraph)"""
  for place, record in sources.read(source, where):
    if "text" not in record:
      raise UserError(f"{place}: has no field 'text' but {', '.join(record)}; expected records {where.needs}")
    text = record["text"]
    if not isinstance(text, str):
      raise UserError(f"{place}: the field 'text' is {json.dumps(text, default=repr)[:50]}; expected a text")
    try:
      text.encode()  # JSON can spell half of a surrogate pair
    except UnicodeEncodeError as e:
      raise UserError(f"{place}: the field 'text' is no valid text ({e})") from e
    body = _GUTENBERG.search(text)
    between = "\n"
    for paragraph in re.split(r"\n\s*\n", body[1] if body else text):
      if paragraph.strip():
        yield between, paragraph.strip()
        between = "\n\n"


def _joined(paragraphs: Iterable[tuple[str, str]], chars: int) -> Iterator[str]:
  passage = ""
  for between, paragraph in paragraphs:
    if passage and len(passage) + len(between) + len(paragraph) > chars:
      yield passage
      passage = ""
    passage += between + paragraph if passage else paragraph
  if passage:
    yield passage
