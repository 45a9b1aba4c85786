"""Records from files of every form, from a hub and a tfds that are local copies, and what cannot be read."""

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from etils import epath

from imm_jax import tasks
from imm_jax.errors import UserError
from imm_jax.tasks import registry, sources

RECORDS = [{"question": "1+1, or \"2\"?\nSay.", "answer": "two"}, {"question": "é\u2028{x} \\frac12", "answer": ""}]
WHERE = sources.ReadOptions("test", "task", ("published.json", "sub/*.json", "a.csv|b.csv"), ("question", "answer"),
                      "with the fields question, answer")
JSONL = "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS)
CSV = '"1+1, or ""2""?\nSay.",two\né\u2028{x} \\frac12,\n'
XML = """<?xml version="1.0" encoding="UTF-8"?>
<File><Set><Problem ID="7"><Question>1+1, or "2"?
Say.</Question><Answer>two</Answer></Problem>
<Problem ID="8"><Question>é&#8232;{x} \\frac12</Question><Answer/></Problem></Set></File>"""


@pytest.fixture(autouse=True)
def _nothing_read_before() -> None:
  registry._read.cache_clear()  # each test has a hub and a tfds of its own


def read(source: str, where: sources.ReadOptions = WHERE) -> list[dict[str, Any]]:
  return [record for _, record in sources.read(source, where)]


def refused(source: str, where: sources.ReadOptions = WHERE) -> str:
  with pytest.raises(UserError) as raised:
    read(source, where)
  assert "\n" not in str(raised.value)
  return str(raised.value)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("name", "text"), [
    ("a.jsonl", JSONL), ("a.jsonl", f"\ufeff{JSONL}\r\n\r\n"), ("a.json", json.dumps(RECORDS, indent=1)),
    ("a.json", f"{JSONL}\n"), ("a.csv", f"Question,Answer\n{CSV}"), ("a.csv", CSV), ("A.CSV", CSV), ("a.xml", XML)])
def test_a_file_of_every_form_gives_the_same_records(name, text, zipped, tmp_path):
  path = tmp_path / (f"{name}.gz" if zipped else name)
  path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
  records = read(f"file:{path}")
  assert [{k: r[k] for k in ("question", "answer")} for r in records] == RECORDS
  if name == "a.xml":
    assert [r["id"] for r in records] == ["7", "8"]


def test_single_objects_and_txt_files(tmp_path):
  """One object of a JSON file is one record; a .txt file is read, too."""
  (tmp_path / "a.json").write_text(json.dumps({"Problem": "P", "level": 5}, indent=2))
  assert read(f"file:{tmp_path}/a.json") == [{"problem": "P", "level": 5}]
  (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo")
  assert read(f"file:{tmp_path}/a.txt") == [{"text": "one\n\ntwo"}]


def test_a_place_names_file_and_line(tmp_path):
  (tmp_path / "a.jsonl").write_text(f"{JSONL.splitlines()[0]}\n\n{{\"question\": 1}}\n")
  (tmp_path / "a.json").write_text(json.dumps(RECORDS))
  assert [place for place, _ in sources.read(f"file:{tmp_path}/a.jsonl", WHERE)] == [
      f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]
  assert [place for place, _ in sources.read(f"file:{tmp_path}/a.json", WHERE)] == [
      f"{tmp_path}/a.json record 1", f"{tmp_path}/a.json record 2"]


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.jsonl", b'{"a": 1}\n{"a": \n', ":2: not a JSON object"),
    ("a.jsonl", b'{"a": 1}\n[1]\n', ":2: expected an object"),
    ("a.jsonl", b'[\n {"a": 1}\n]\n', "; as a whole the file is JSON: end its name in .json"),
    ("a.jsonl", b'[{"a": 1}]\n', ":1: expected an object with fields, not list; a file that is one list of "),
    ("a.csv", b"question;answer\nq;1\n", ":1: its only column is 'question;answer', which ';' seems to separate"),
    ("a.csv", b"question\tanswer\nq\t1\n", "which '\\t' seems to separate; expected commas"),
    ("a.jsonl", b"[" * 100_000, ":1: not a JSON object"),
    ("a.jsonl", b'{"a": "\xff"}', ": cannot be read ('utf-8' codec"),
    ("a.json", b'[\n{"a": 1},\n{"a" 2}]', ":3: not JSON"),
    ("a.json", b'{"a": 1}\n{"a": \n', ":2: not a JSON object"),
    ("a.json", b"[1]", " record 1: expected an object"),
    ("a.json.gz", b"no gzip", ": cannot be read (Not a gzip"),
    ("a.json.gz", gzip.compress(b"[]" * 999, mtime=0)[:-9], ": cannot be read (Compressed file ended"),
    ("a.csv", b"question,answer\nq\n", ":2: 1 columns, expected 2"),
    ("a.csv", b'question,answer\n"q" x,a\n', ":2: not csv"),
    ("a.csv", b'question,answer\n"q,a\n', "not csv"),
    ("a.xml", b"<a>\n<b></a>", ":2: not XML"),
    ("a.parquet", b"", ": expected a name that ends in .jsonl, .json, .csv, .xml, .txt"),
    (".json", b"[]", ": expected a name that ends in")])
def test_a_damaged_file_is_named_with_its_line(name, data, message, tmp_path):
  (tmp_path / name).write_bytes(data)
  refusal = refused(f"file:{tmp_path}/{name}")
  assert refusal.startswith(f"{tmp_path}/{name}")
  assert message in refusal


def test_entities_of_xml_do_not_grow_without_bound(tmp_path):
  levels = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
  (tmp_path / "a.xml").write_text(f'<!DOCTYPE a [<!ENTITY e0 "0123456789">{levels}]><a><b>&e11;</b></a>')
  assert "not XML" in refused(f"file:{tmp_path}/a.xml")


@pytest.mark.parametrize("name", ["test.jsonl", "test.json", "test.csv", "published.json", "task/test.jsonl",
                                  "task/published.json", "sub/1.json", "task/sub/1.json"])
def test_folder_is_searched(name, tmp_path):
  """It is searched for the split and for the published names."""
  text = {"jsonl": JSONL, "json": json.dumps(RECORDS), "csv": CSV}[name.rpartition(".")[2]]
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / name).write_text(text)
  (tmp_path / "train.jsonl").write_text('{"other": 1}')
  assert read(f"file:{tmp_path}") == RECORDS
  with gzip.open(tmp_path / "test.jsonl.gz", "wt") as f:
    f.write('{"first": 1}')
  assert read(f"file:{tmp_path}") == (RECORDS if name.startswith("test.jsonl") else [{"first": 1}])


def test_several_published_files_are_read_in_order(tmp_path):
  for name, text in (("b.csv", "q2,a2\n"), ("a.csv", "q1,a1\n"), ("c.csv", "q3,a3\n")):
    (tmp_path / name).write_text(text)
  assert [r["question"] for r in read(f"file:{tmp_path}")] == ["q1", "q2"]
  (tmp_path / "sub").mkdir()
  for i in (2, 10, 1):
    (tmp_path / "sub" / f"{i}.json").write_text(json.dumps({"n": i}))
  assert [r["n"] for r in read(f"file:{tmp_path}")] == [1, 10, 2]


def test_split_stands_for_its_name_in_a_path(tmp_path):
  (tmp_path / "my_test.jsonl").write_text(JSONL)
  assert read(f"file:{tmp_path}/my_{{split}}.jsonl") == RECORDS
  assert "my_train.jsonl is no file or folder" in refused(
      f"file:{tmp_path}/my_{{split}}.jsonl", WHERE._replace(split="train"))


def test_what_is_not_there_says_what_was_sought(tmp_path, monkeypatch):
  assert refused(f"file:{tmp_path}") == (
      f"file:{tmp_path}: {tmp_path} holds no test.jsonl (.json, .csv, .xml; or with .gz) or published.json or "
      "sub/*.json or a.csv; expected records with the fields question, answer")
  assert "no/such is no file or folder; " in refused(f"file:{tmp_path}/no/such")
  monkeypatch.chdir(tmp_path)
  assert refused("file:no.jsonl").startswith(f"file:no.jsonl: no.jsonl is no file or folder in {tmp_path}; expected")


def test_a_path_may_lie_in_a_bucket(tmp_path, monkeypatch):
  (tmp_path / "test.jsonl").write_text(JSONL)
  asked = []
  monkeypatch.setattr(epath, "Path", lambda path: asked.append(path) or tmp_path)
  assert read("file:gs://bucket/folder") == RECORDS
  assert asked == ["gs://bucket/folder"]

  def refuse(_):
    raise PermissionError("no credentials\nmore")

  monkeypatch.setattr(epath, "Path", refuse)
  assert refused("file:gs://bucket/folder") == "file:gs://bucket/folder: cannot be read (no credentials)"


_SOURCES = "expected hf:ID[:config][:split], tfds:NAME[:split] or file:PATH"


@pytest.mark.parametrize(("source", "expected"), [
    ("", _SOURCES), ("gsm8k", _SOURCES), ("hf:", _SOURCES), ("http://x/y", _SOURCES),
    ("/x.json", f"{_SOURCES}; did you mean file:/x.json?"), ("x.CSV.gz", f"{_SOURCES}; did you mean file:x.CSV.gz?"),
    ("/tmp", f"{_SOURCES}; did you mean file:/tmp?"),
    ("hf:a@:b", "expected hf:ID[@revision][:config][:split]"),
    ("tfds:huggingface:gsm8k", "expected tfds:NAME[:split]; a data set of the hub is hf:ID")],
    ids=["empty", "name", "no-id", "address", "path", "zipped", "folder", "no-revision", "tfds-of-the-hub"])
def test_a_source_of_no_known_form_says_the_forms(source, expected):
  assert refused(source) == f"source {source!r}: {expected}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
  """A hub whose data sets are folders here; the list of what it was asked."""
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  real, asked = datasets.load_dataset, []

  def load_dataset(name, config=None, *, split, revision=None, streaming=False):
    asked.append((name, config, split, revision))
    return real(str(tmp_path / name), config, split=split, streaming=streaming)

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  return asked


def gsm8k(i: int) -> dict[str, str]:
  return {"question": f"{i} and {i}?", "answer": f"<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}


def test_hub_and_files_agree(hub, tmp_path):
  """The hub gives the questions and ids that files give."""
  folder = tmp_path / "openai" / "gsm8k"
  folder.mkdir(parents=True)
  datasets.Dataset.from_list([gsm8k(i) for i in range(5)]).to_parquet(folder / "train-00000-of-00001.parquet")
  datasets.Dataset.from_list([gsm8k(i) for i in range(5, 9)]).to_parquet(folder / "test-00000-of-00001.parquet")
  (folder / "README.md").write_text(
      "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train-*\n"
      "  - split: test\n    path: test-*\n---\n")
  (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(gsm8k(i)) for i in (3, 1, 4, 0, 2)))
  (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(gsm8k(i)) for i in (8, 7, 6, 5)))
  for split in ("train", "test"):
    assert tasks.load("gsm8k", split=split) == tasks.load("gsm8k", split=split, source=f"file:{tmp_path}")
  assert set(hub) == {("openai/gsm8k", "main", "train", None), ("openai/gsm8k", "main", "test", None)}


def test_hub_sources_name_configs_split_and_revision(hub, tmp_path):
  folder = tmp_path / "own"
  folder.mkdir()
  for name in ("a_x", "b_x", "a_y"):
    (folder / f"{name}.jsonl").write_text(json.dumps({"q": name}))
  (folder / "README.md").write_text("---\nconfigs:\n" + "".join(
      f"- config_name: {c}\n  data_files:\n" + "".join(f"  - split: {s}\n    path: {c}_{s}.jsonl\n" for s in splits)
      for c, splits in (("a", "xy"), ("b", "x"))) + "---\n")
  assert [r["q"] for r in read("hf:own:a+b:x")] == ["a_x", "b_x"]
  assert [r["q"] for r in read("hf:own@v1.0:a", WHERE._replace(split="y"))] == ["a_y"]
  assert [r["q"] for r in read("hf:own:a:x+y")] == ["a_x", "a_y"]
  assert [r["q"] for r in read("hf:own:a:x", WHERE._replace(stream=True))] == ["a_x"]
  assert hub == [("own", "a", "x", None), ("own", "b", "x", None), ("own", "a", "y", "v1.0"), ("own", "a", "x+y", None),
                 ("own", "a", "x", None)]
  refusal = refused("hf:own:a")
  assert "Unknown split" in refusal
  assert "['x', 'y']" in refusal


@pytest.mark.parametrize("error", [
    ConnectionError("Couldn't reach 'x' on the Hub\nmore"), RuntimeError("Dataset scripts are no longer supported, but "
                                                                       "found x.py"), ValueError("BuilderConfig 'x'")])
def test_failed_download_names_local_files(error, monkeypatch):
  """It says what to give instead."""
  def refuse(*_, **__):
    raise error

  monkeypatch.setattr(datasets, "load_dataset", refuse)
  with pytest.raises(UserError) as raised:
    tasks.load("svamp", split="test", count=3)
  assert str(raised.value) == (
      f"hf:ChilleD/SVAMP::train+test: split test cannot be read ({str(error).splitlines()[0]}); give a local copy, "
      "--config.task.source=file:PATH for the task in domain, NAME=file:PATH in --config.task.ood or "
      "--config.eval.texts (or in --task of imm_jax.analyze) for another, or leave that one out; PATH is a "
      "jsonl, json, csv, xml file (or a folder with test.jsonl or the like) with the fields body, question, answer")


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """tfds keeps its data here."""
  monkeypatch.setattr(tfds, "data_source", functools.partial(tfds.data_source, data_dir=tmp_path / "tfds"))
  return tmp_path


def test_tfds_builds_from_a_local_copy(prepared, monkeypatch):
  """GSM8K; it gives the same questions."""
  for split, numbers in (("train", range(5)), ("test", range(5, 9))):
    (prepared / f"{split}.jsonl").write_text("\n".join(json.dumps(gsm8k(i)) for i in numbers))
  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda _, urls: {
      name: prepared / f"{name.removesuffix('_socratic')}.jsonl" for name in urls})
  for split in ("train", "test"):
    assert tasks.load("gsm8k", split=split, source="tfds:gsm8k") == tasks.load(
        "gsm8k", split=split, source=f"file:{prepared}")
  assert {r["short_answer"] for r in read("tfds:gsm8k:train")} == {str(2 * i) for i in range(5)}
  assert {r["short_answer"] for r in read("tfds:gsm8k:1.0.0:test")} == {str(2 * i) for i in range(5, 9)}
  assert "Unknown split 'dev'" in refused("tfds:gsm8k:dev")


@pytest.mark.parametrize(("source", "cause"), [("tfds:gsm8k", "no network"), ("tfds:no_set", "no_set not found")])
def test_failed_tfds_names_local_files(source, cause, prepared, monkeypatch):
  """It says what to give instead."""
  def refuse(*_):
    raise requests.exceptions.ConnectionError("no network\nmore")

  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", refuse)
  refusal = refused(source)
  assert cause in refusal
  assert "--config.task.source=file:PATH" in refusal


def test_lists_and_bytes_of_tfds_become_text():
  assert sources._decode(np.array([b"a", "é".encode()], dtype=object)) == ["a", "é"]
  assert sources._decode(np.int64(3)) == 3
