"""Reading records: of the Hugging Face hub (`hf:`), of TensorFlow Datasets (`tfds:`), of files (`file:`).

    hf:ID[@REVISION][:CONFIG][:SPLIT]   the datasets library; CONFIG may be several, `algebra+geometry`
    tfds:NAME[:SPLIT]                   tfds.data_source, which needs no tensorflow
    file:PATH                           json, jsonl, csv, xml or txt, each also as .gz: a file, a folder, or in a bucket

One string serves all splits of a task: without SPLIT the one that is asked for is read, `{split}` in a PATH stands for
its name, and a folder holds `train.jsonl`, `test.json.gz`, ..., or the files as they are published. No code that comes
with a data set is run, and nothing is unpickled.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from imm_jax.errors import UserError

FORMATS = ("jsonl", "json", "csv", "xml", "txt")
_HF = re.compile(r"(?P<id>[^:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:]*))?(?::(?P<split>[^:]+))?")
_TFDS = re.compile(r"(?P<name>[^:]+(?::[0-9]+\.[0-9]+\.[0-9]+)?)(?::(?P<split>[^:]+))?")


class Where(NamedTuple):
  """What of a source is read.

  Attributes:
    split: the name of the split.
    folder: of the task's files below PATH, where they do not lie in PATH itself.
    files: the published files of this split below the folder: patterns, of which the first that fits any file counts;
      `a.csv|b.csv` stands for both together.
    columns: of a csv file that has no header.
    needs: what the records must hold, in words, for messages.
    with_file: whether a file's records say its name, as `file`: where that holds what no field does.
    stream: whether a hub's data set is read as it comes, without the rest of it, and kept nowhere.
  """

  split: str
  folder: str = ""
  files: Sequence[str] = ()
  columns: Sequence[str] = ()
  needs: str = ""
  with_file: bool = False
  stream: bool = False


def read(source: str, where: Where) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, record): the place names file and line for messages, the record's keys are in lower case.

  Raises:
    UserError: for a source that is not of a known form, that cannot be read, or that holds something else.
  """
  check(source)
  scheme, _, rest = source.partition(":")
  for place, record in _READERS[scheme](source, rest, where):
    if not isinstance(record, dict):
      raise UserError(f"{place}: expected an object with fields, not {type(record).__name__}")
    yield place, {str(key).lower(): value for key, value in record.items()}


def check(source: str) -> None:
  """Raises UserError for a source that is not of a known form, or a file of another kind; reads nothing."""
  scheme, _, rest = source.partition(":")
  if scheme not in _READERS or not rest:
    raise UserError(f"source {source!r}: expected hf:ID[:config][:split], tfds:NAME[:split] or file:PATH")
  if scheme == "file" and (path := Path(rest)).is_file():
    _parser(path)


def _read_hf(source: str, rest: str, where: Where) -> Iterator[tuple[str, dict[str, Any]]]:
  match = _HF.fullmatch(rest)
  if not match:
    raise UserError(f"source {source!r}: expected hf:ID[@revision][:config][:split]")
  split = match["split"] or where.split
  for config in (match["config"] or "").split("+"):
    try:
      import datasets  # late: it takes a second, and most runs read files
      # Since 4.0 it runs no code of a data set.
      rows = datasets.load_dataset(match["id"], config or None, split=split, revision=match["revision"],
                                   streaming=where.stream)
      for number, row in enumerate(rows, 1):
        yield f"{source} ({split}) record {number}", row
    except Exception as e:  # the hub's own, the system's, those of whichever HTTP library and file format it uses
      raise _unreachable(source, e, where) from e


def _read_tfds(source: str, rest: str, where: Where) -> Iterator[tuple[str, dict[str, Any]]]:
  match = _TFDS.fullmatch(rest)
  if not match or match["name"] == "huggingface":
    raise UserError(f"source {source!r}: expected tfds:NAME[:split]"
                    + ("; a data set of the hub is hf:ID" if match else ""))
  split = match["split"] or where.split
  try:
    import tensorflow_datasets as tfds  # late: as above
    import tensorflow_datasets.text  # registers its builders, which are imported lazily
    # The default format, tfrecord, needs tensorflow to be written.
    rows = tfds.data_source(match["name"], split=split, builder_kwargs={"file_format": "array_record"})
    for number in range(len(rows)):
      yield f"{source} ({split}) record {number + 1}", {key: _decoded(value) for key, value in rows[number].items()}
  except Exception as e:  # tfds raises whatever its builders raise
    raise _unreachable(source, e, where) from e


def _decoded(value: Any) -> Any:
  """Text comes as bytes, lists as arrays."""
  if isinstance(value, bytes):
    return value.decode()
  if hasattr(value, "tolist"):
    return _decoded(value.tolist())
  return [_decoded(v) for v in value] if isinstance(value, list) else value


def _unreachable(source: str, error: Exception, where: Where) -> UserError:
  cause = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
  return UserError(f"{source}: split {where.split} cannot be read ({cause}); give a local copy, "
                   "--config.task.source=file:PATH for the task in domain, NAME=file:PATH in --config.task.ood or "
                   "--config.eval.texts (or in --task of imm_jax.analyze) for another, where PATH is a "
                   f"{', '.join(FORMATS[:-1])} file (or a folder with {where.split}.jsonl or the like) {where.needs}"
                   .rstrip())


def _read_files(source: str, rest: str, where: Where) -> Iterator[tuple[str, dict[str, Any]]]:
  from etils import epath  # late: 40 ms

  try:
    path = epath.Path(rest.replace("{split}", where.split))
    files = [path] if path.is_file() else _of_folder(path, where)
  except Exception as e:  # a bucket's client raises its own
    raise UserError(f"{source}: cannot be read ({_cause(e)})") from e
  if not files:
    known = " or ".join((f"{where.split}.jsonl (.json, .csv, .xml; or with .gz)",
                         *(pattern.partition("|")[0] for pattern in where.files)))
    raise UserError(f"{source}: {f'{path} holds no {known}' if path.is_dir() else f'{path} is no file or folder'}; "
                    f"expected records {where.needs}".rstrip())
  for file in files:
    for place, record in _parse(file, where):
      yield place, {"file": file.name} | record if where.with_file and isinstance(record, dict) else record


def _of_folder(path: Any, where: Where) -> list[Any]:
  """The split's files in a folder, or in the task's folder below it."""
  generic = [f"{where.split}.{kind}{gz}" for kind in FORMATS for gz in ("", ".gz")]
  for folder in (path, path / where.folder) if where.folder else (path,):
    for pattern in (*generic, *where.files):
      found = [file for name in pattern.split("|")
               for file in (sorted(folder.glob(name)) if "*" in name else [folder / name]) if file.is_file()]
      if found:
        return found
  return []


def _parser(file: Any) -> Callable[[Any, str, Where], Iterator[tuple[str, Any]]]:
  """Returns the function that reads files of this name; raises UserError where there is none."""
  stem, _, kind = file.name.removesuffix(".gz").rpartition(".")
  parse = {"jsonl": _jsonl, "json": _json, "csv": _csv, "xml": _xml, "txt": _txt}.get(kind.lower() if stem else "")
  if parse is None:
    raise UserError(f"{file}: expected a name that ends in {', '.join(f'.{f}' for f in FORMATS)}, or one of them with "
                    ".gz")
  return parse


def _parse(file: Any, where: Where) -> Iterator[tuple[str, Any]]:
  parse = _parser(file)
  try:
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.name.endswith(".gz") else data).decode("utf-8-sig")
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
    expected = "; expected UTF-8" if isinstance(e, UnicodeDecodeError) else ""
    raise UserError(f"{file}: cannot be read ({_cause(e)}){expected}") from e
  return parse(file, text, where)


def _jsonl(file: Any, text: str, _: Where) -> Iterator[tuple[str, Any]]:
  for number, line in enumerate(text.split("\n"), 1):  # no splitlines: a text may hold other line ends
    if line.strip():
      try:
        yield f"{file}:{number}", json.loads(line)
      except (ValueError, RecursionError) as e:
        raise UserError(f"{file}:{number}: not a JSON object ({e})") from e


def _json(file: Any, text: str, where: Where) -> Iterator[tuple[str, Any]]:
  """A list of records, one record, or, as in many files of this name, one record a line."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as e:
    if isinstance(e, json.JSONDecodeError) and e.msg == "Extra data" and text.lstrip().startswith("{"):
      yield from _jsonl(file, text, where)
      return
    raise UserError(f"{file}:{getattr(e, 'lineno', 1)}: not JSON ({e})") from e
  if isinstance(value, list):
    yield from ((f"{file} record {number}", record) for number, record in enumerate(value, 1))
  else:
    yield str(file), value


def _csv(file: Any, text: str, where: Where) -> Iterator[tuple[str, Any]]:
  rows = csv.reader(io.StringIO(text, newline=""), strict=True)
  names = None
  while True:
    try:
      row = next(rows, None)
    except csv.Error as e:
      raise UserError(f"{file}:{rows.line_num}: not csv ({e})") from e
    if row is None:
      return
    if names is None:
      lower = [name.strip().lower() for name in row]
      headless = len(where.columns) == len(row) and not set(where.columns) & set(lower)
      names = where.columns if headless else lower
      if not headless:
        continue
    if row and len(row) != len(names):
      raise UserError(f"{file}:{rows.line_num}: {len(row)} columns, expected {len(names)} ({', '.join(names)})")
    if row:
      yield f"{file}:{rows.line_num}", dict(zip(names, row, strict=True))


def _xml(file: Any, text: str, _: Where) -> Iterator[tuple[str, Any]]:
  """Every element whose children hold text only is a record; its attributes are fields, too."""
  try:
    root = ElementTree.fromstring(text)
  except (ElementTree.ParseError, ValueError) as e:
    raise UserError(f"{file}:{getattr(e, 'position', (1,))[0]}: not XML ({e})") from e
  records = [e for e in root.iter() if len(e) and not any(len(child) for child in e)]
  for number, element in enumerate(records, 1):
    fields: Mapping[str, str] = {**element.attrib, **{child.tag: child.text or "" for child in element}}
    yield f"{file} record {number}", dict(fields)


def _txt(file: Any, text: str, _: Where) -> Iterator[tuple[str, Any]]:
  yield str(file), {"text": text.replace("\r\n", "\n")}


def _cause(error: Exception) -> str:
  return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


_READERS = {"hf": _read_hf, "tfds": _read_tfds, "file": _read_files}
