"""Reads records from the Hugging Face hub (`hf:`), from TensorFlow Datasets (`tfds:`), and from files (`file:`).

    hf:ID[@REVISION][:CONFIG][:SPLIT]   the datasets library; CONFIG may be several, `algebra+geometry`
    tfds:NAME[:SPLIT]                   tfds.data_source, which needs no tensorflow
    file:PATH                           json, jsonl, csv, xml or txt, each also as .gz: a file, a folder, or in a bucket

One string serves all splits of a task: without SPLIT the requested one is read, `{split}` in a PATH is replaced by its
name, and a folder holds `train.jsonl`, `test.json.gz`, ..., or the files as they are published. No code of data sets is
run, and nothing is unpickled.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from imm_jax.errors import UserError, first_line

FORMATS = ("jsonl", "json", "csv", "xml", "txt")
_HF = re.compile(r"(?P<id>[^:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:]*))?(?::(?P<split>[^:]+))?")
_TFDS = re.compile(r"(?P<name>[^:]+(?::[0-9]+\.[0-9]+\.[0-9]+)?)(?::(?P<split>[^:]+))?")


class ReadOptions(NamedTuple):
  """Holds the options of reading a source.

  Attributes:
    split: name of the split.
    folder: subfolder of PATH with the task's files, if they are not in PATH itself.
    files: patterns of the published files of this split in the folder; the first that matches any file is used, and
      `a.csv|b.csv` stands for both files together.
    columns: columns of csv files without a header.
    needs: description of the required records, for messages.
    with_file: whether records get the name of their file as `file`, if it has information that no field has.
    stream: whether to stream a data set of the hub instead of downloading it to the cache.
  """

  split: str
  folder: str = ""
  files: Sequence[str] = ()
  columns: Sequence[str] = ()
  needs: str = ""
  with_file: bool = False
  stream: bool = False


def read(source: str, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (location, record). The location names file and line for messages; keys of records are in lower case.

  Raises:
    UserError: for a source of unknown form, that cannot be read, or that holds other data.
  """
  check(source)
  scheme, _, rest = source.partition(":")
  for location, record in _READERS[scheme](source, rest, options):
    if not isinstance(record, dict):
      advice = "; a file that is one list of records ends in .json" if isinstance(record, list) else ""
      raise UserError(f"{location}: expected an object with fields, not {type(record).__name__}{advice}")
    yield location, {str(key).lower(): value for key, value in record.items()}


def check(source: str) -> None:
  """Raises UserError for a source of unknown form, or a local file of unknown kind, without reading it."""
  scheme, _, rest = source.partition(":")
  if scheme not in _READERS or not rest:
    advice = f"; did you mean file:{source}?" if _looks_like_path(source) else ""
    raise UserError(f"source {source!r}: expected hf:ID[:config][:split], tfds:NAME[:split] or file:PATH{advice}")
  if scheme == "file" and (path := Path(rest)).is_file():
    _find_parser(path)


def _looks_like_path(source: str) -> bool:
  """Returns whether a source without `file:` is a path, by its end or because there is such a file or folder."""
  return source.removesuffix(".gz").rpartition(".")[2].lower() in FORMATS or (bool(source) and os.path.exists(source))


def _read_hf(source: str, rest: str, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any]]]:
  match = _HF.fullmatch(rest)
  if not match:
    raise UserError(f"source {source!r}: expected hf:ID[@revision][:config][:split]")
  split = match["split"] or options.split
  for config in (match["config"] or "").split("+"):
    try:
      import datasets  # imported here because it takes a second, and most runs read files
      # Since version 4.0 it does not run code of data sets.
      rows = datasets.load_dataset(match["id"], config or None, split=split, revision=match["revision"],
                                   streaming=options.stream)
      for number, row in enumerate(rows, 1):
        yield f"{source} ({split}) record {number}", row
    except Exception as e:  # errors of the hub, the system, and whichever HTTP library and file format are in use
      raise _read_error(source, e, options) from e


def _read_tfds(source: str, rest: str, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any]]]:
  match = _TFDS.fullmatch(rest)
  if not match or match["name"] == "huggingface":
    raise UserError(f"source {source!r}: expected tfds:NAME[:split]"
                    + ("; a data set of the hub is hf:ID" if match else ""))
  split = match["split"] or options.split
  try:
    import tensorflow_datasets as tfds  # imported here for the same reason
    import tensorflow_datasets.text  # registers its builders, which are imported lazily
    # Writing the default format, tfrecord, needs tensorflow.
    rows = tfds.data_source(match["name"], split=split, builder_kwargs={"file_format": "array_record"})
    for number in range(len(rows)):
      yield f"{source} ({split}) record {number + 1}", {key: _decode(value) for key, value in rows[number].items()}
  except Exception as e:  # tfds raises whatever its builders raise
    raise _read_error(source, e, options) from e


def _decode(value: Any) -> Any:
  """Converts bytes to text and arrays to lists."""
  if isinstance(value, bytes):
    return value.decode()
  if hasattr(value, "tolist"):
    return _decode(value.tolist())
  return [_decode(v) for v in value] if isinstance(value, list) else value


def _read_error(source: str, error: Exception, options: ReadOptions) -> UserError:
  cause = first_line(error).rstrip(".")
  return UserError(f"{source}: split {options.split} cannot be read ({cause}); give a local copy, "
                   "--config.task.source=file:PATH for the task in domain, NAME=file:PATH in --config.task.ood or "
                   "--config.eval.texts (or in --task of imm_jax.analyze) for another, or leave that one out; PATH is "
                   f"a {', '.join(FORMATS[:-1])} file (or a folder with {options.split}.jsonl or the like) "
                   f"{options.needs}".rstrip())


def _read_files(source: str, rest: str, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any]]]:
  from etils import epath  # imported here because it takes 40 ms

  try:
    path = epath.Path(rest.replace("{split}", options.split))
    files = [path] if path.is_file() else _find_files(path, options)
  except Exception as e:  # clients of buckets raise their own exceptions
    raise UserError(f"{source}: cannot be read ({_error_cause(e)})") from e
  if not files:
    known = " or ".join((f"{options.split}.jsonl (.json, .csv, .xml; or with .gz)",
                         *(pattern.partition("|")[0] for pattern in options.files)))
    start = "" if path.is_absolute() or "://" in rest else f" in {os.getcwd()}"
    problem = f"{path} holds no {known}" if path.is_dir() else f"{path} is no file or folder{start}"
    raise UserError(f"{source}: {problem}; expected records {options.needs}".rstrip())
  for file in files:
    for location, record in _parse_file(file, options):
      yield location, {"file": file.name} | record if options.with_file and isinstance(record, dict) else record


def _find_files(path: Any, options: ReadOptions) -> list[Any]:
  """Finds the split's files in a folder, or in the task's subfolder."""
  generic = [f"{options.split}.{extension}{gz}" for extension in FORMATS for gz in ("", ".gz")]
  for folder in (path, path / options.folder) if options.folder else (path,):
    for pattern in (*generic, *options.files):
      matches = [file for name in pattern.split("|")
                 for file in (sorted(folder.glob(name)) if "*" in name else [folder / name]) if file.is_file()]
      if matches:
        return matches
  return []


def _find_parser(file: Any) -> Callable[[Any, str, ReadOptions], Iterator[tuple[str, Any]]]:
  """Returns the function that parses files of this name; raises UserError where there is none."""
  stem, _, extension = file.name.removesuffix(".gz").rpartition(".")
  parsers = {"jsonl": _parse_jsonl, "json": _parse_json, "csv": _parse_csv, "xml": _parse_xml, "txt": _parse_txt}
  parse = parsers.get(extension.lower() if stem else "")
  if parse is None:
    raise UserError(f"{file}: expected a name that ends in {', '.join(f'.{f}' for f in FORMATS)}, or one of them with "
                    ".gz")
  return parse


def _parse_file(file: Any, options: ReadOptions) -> Iterator[tuple[str, Any]]:
  parse = _find_parser(file)
  try:
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.name.endswith(".gz") else data).decode("utf-8-sig")
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
    expected = "; expected UTF-8" if isinstance(e, UnicodeDecodeError) else ""
    raise UserError(f"{file}: cannot be read ({_error_cause(e)}){expected}") from e
  return parse(file, text, options)


def _parse_jsonl(file: Any, text: str, _: ReadOptions) -> Iterator[tuple[str, Any]]:
  for number, line in enumerate(text.split("\n"), 1):  # not splitlines: texts may contain other line separators
    if line.strip():
      try:
        yield f"{file}:{number}", json.loads(line)
      except (ValueError, RecursionError) as e:
        advice = "; as a whole the file is JSON: end its name in .json" if _is_json(text) else ""
        raise UserError(f"{file}:{number}: not a JSON object ({e}){advice}") from e


def _is_json(text: str) -> bool:
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True


def _parse_json(file: Any, text: str, options: ReadOptions) -> Iterator[tuple[str, Any]]:
  """Parses a list of records, one record, or, as in many files of this name, one record in each line."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as e:
    if isinstance(e, json.JSONDecodeError) and e.msg == "Extra data" and text.lstrip().startswith("{"):
      yield from _parse_jsonl(file, text, options)
      return
    raise UserError(f"{file}:{getattr(e, 'lineno', 1)}: not JSON ({e})") from e
  if isinstance(value, list):
    yield from ((f"{file} record {number}", record) for number, record in enumerate(value, 1))
  else:
    yield str(file), value


def _parse_csv(file: Any, text: str, options: ReadOptions) -> Iterator[tuple[str, Any]]:
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
      other = next((mark for mark in ";\t|" if len(row) == 1 and mark in row[0]), "")
      if other:
        raise UserError(f"{file}:1: its only column is {row[0]!r:.80}, which {other!r} seems to separate; expected "
                        "commas")
      has_no_header = len(options.columns) == len(row) and not set(options.columns) & set(lower)
      names = options.columns if has_no_header else lower
      if not has_no_header:
        continue
    if row and len(row) != len(names):
      raise UserError(f"{file}:{rows.line_num}: {len(row)} columns, expected {len(names)} ({', '.join(names)})")
    if row:
      yield f"{file}:{rows.line_num}", dict(zip(names, row, strict=True))


def _parse_xml(file: Any, text: str, _: ReadOptions) -> Iterator[tuple[str, Any]]:
  """Parses every element whose children contain only text as a record; its attributes are fields too."""
  try:
    root = ElementTree.fromstring(text)
  except (ElementTree.ParseError, ValueError) as e:
    raise UserError(f"{file}:{getattr(e, 'position', (1,))[0]}: not XML ({e})") from e
  records = [e for e in root.iter() if len(e) and not any(len(child) for child in e)]
  for number, element in enumerate(records, 1):
    fields: Mapping[str, str] = {**element.attrib, **{child.tag: child.text or "" for child in element}}
    yield f"{file} record {number}", dict(fields)


def _parse_txt(file: Any, text: str, _: ReadOptions) -> Iterator[tuple[str, Any]]:
  yield str(file), {"text": text.replace("\r\n", "\n")}


def _error_cause(error: Exception) -> str:
  return getattr(error, "strerror", None) or first_line(error)


_READERS = {"hf": _read_hf, "tfds": _read_tfds, "file": _read_files}
