"""The registry of tasks: ids, order, splits, what is left out, and where data comes from."""

import pytest

from imm_jax import tasks
from imm_jax.errors import UserError
from imm_jax.tasks import catalogue, formats, registry
from tests.tasks.records import CUSTOM, gsm8k, write


def test_ids_follow_from_split_and_content_alone(tmp_path):
  records = [gsm8k(f"Question {i}?") for i in range(20)]
  one = registry.read("gsm8k", split="test", source=f"file:{write(tmp_path / 'a.jsonl', records)}")
  other = registry.read("gsm8k", split="test", source=f"file:{write(tmp_path / 'b.jsonl', records[:0:-1])}")
  ids = {e.question: e.id for e in one.examples}
  assert len(set(ids.values())) == 20
  assert all(ids[e.question] == e.id for e in other.examples)
  write(tmp_path / "train.jsonl", records)
  write(tmp_path / "test.jsonl", [gsm8k("Another?")])
  train = registry.read("gsm8k", split="train", source=f"file:{tmp_path}")
  assert not {e.id for e in train.examples} & set(ids.values())


def test_order_depends_on_seed(tmp_path):
  """It depends on the split, too, and not on the order of the file."""
  records = [gsm8k(f"Question {i}?") for i in range(50)]
  sources = [f"file:{write(tmp_path / name, rows)}" for name, rows in (
      ("a.jsonl", records), ("b.jsonl", records[::-1]))]
  load = lambda source, **options: [e.question for e in tasks.load("gsm8k", split="test", source=source, **options)]
  whole = load(sources[0])
  assert sorted(whole) == sorted(r["question"] for r in records)
  assert whole != [r["question"] for r in records]
  assert load(sources[1]) == whole
  assert load(sources[0], count=7) == whole[:7]
  assert load(sources[0], seed=1) != whole
  with pytest.raises(ValueError, match=r"gsm8k/test holds 50 questions, 51 were asked for"):
    load(sources[0], count=51)


def test_test_questions_leave_the_train_set(tmp_path, capsys):
  """Those in the test set, and repeated ones, are left out, and told once."""
  write(tmp_path / "test.jsonl", [gsm8k("Both?"), gsm8k("Test?"), gsm8k("Test?", "4")])
  write(tmp_path / "train.jsonl", [gsm8k("Train?"), gsm8k(" Both? "), gsm8k("Train?", "5"), gsm8k("None?", "five"),
                                   gsm8k("Last?")])
  source = f"file:{tmp_path}"
  found = registry.read("gsm8k", split="train", source=source)
  assert [e.question for e in found.examples] == ["Train?", "Last?"]
  assert found.counts == {"records": 5, "no_gold": 1, "repeated": 1, "in_test": 1}
  for _ in range(2):
    tasks.load("gsm8k", split="train", source=source)
  told = capsys.readouterr().err.splitlines()
  assert told == [
      f"warning: gsm8k/train: {source} holds 5 records, published are 7473; the source is short or changed",
      f"note: gsm8k/train: {source}: of 5 records left out 1 without an answer that can be judged, 1 that repeat "
      "another, 1 that are in the test set"]
  test = tasks.load("gsm8k", split="test", source=source)
  assert sorted((e.question, e.answer) for e in test) == [("Both?", "3"), ("Test?", "3"), ("Test?", "4")]


def test_repeated_ids_are_stable(tmp_path):
  """A test split keeps repeats, with ids that do not depend on the order."""
  once, twice = [gsm8k("A?"), gsm8k("B?")], [gsm8k("C?", "5"), gsm8k(" C? ", "4"), gsm8k("C?", "5")]
  orders = [once + twice, twice[::-1] + once, [twice[1], *once, twice[0], twice[2]]]
  found = [registry.read("gsm8k", split="test", source=f"file:{write(tmp_path / f'{i}.jsonl', records)}")
           for i, records in enumerate(orders)]
  ids = [{(e.id, e.answer) for e in split.examples} for split in found]
  assert ids[0] == ids[1] == ids[2]
  assert len(ids[0]) == 5
  assert found[0].counts["repeated"] == 2
  assert not any("left out" in note for note in found[0].notes)
  alone = registry.read("gsm8k", split="test", source=f"file:{write(tmp_path / 'once.jsonl', once)}")
  assert {(e.id, e.answer) for e in alone.examples} < ids[0]
  assert sorted(id_.partition("-")[2] for id_, answer in ids[0]) == ["", "", "", "2", "3"]


def test_published_size_gives_no_warning(tmp_path, capsys):
  records = [{"question": f"P{i}?", "options": "A) 1 B) 2", "Answer": "A"} for i in range(33)]
  assert len(tasks.load("sat_math", split="test", source=f"file:{write(tmp_path / 'a.jsonl', records[:32])}")) == 32
  assert not capsys.readouterr().err
  assert len(tasks.load("sat_math", split="test", source=f"file:{write(tmp_path / 'b.jsonl', records)}")) == 33
  assert "holds 33 records, published are 32" in capsys.readouterr().err


def test_one_file_for_both_splits_is_refused(tmp_path):
  source = f"file:{write(tmp_path / 'train.jsonl', [gsm8k('A?'), gsm8k('B?')])}"
  with pytest.raises(UserError, match=r"holds no question for gsm8k/train, for its 2 are the test set's; does it name "
                                      r"one split for both\?; make DIR/train.jsonl and DIR/test.jsonl"):
    tasks.load("gsm8k", split="train", source=source)


@pytest.mark.parametrize("name", [n for n, t in catalogue.TASKS.items() if "train" not in t.source])
def test_a_task_without_a_train_split_says_so(name):
  with pytest.raises(UserError, match=f"task {name} has no train split, only .*test; it is for evaluation"):
    tasks.load(name, split="train", count=1)


def test_table_gives_source_role_license():
  """It says where each task is from, what its role is, and under what license it comes."""
  for name, task in catalogue.TASKS.items():
    assert task.role in ("id", "ood", "importance")
    assert task.kind in (*formats.KINDS, "")
    assert (task.role == "importance") == (not task.kind) == (name not in tasks.JUDGED)
    assert task.license
    assert "test" in task.source
    assert all(source.startswith("hf:") for source in task.source.values()) or (name == "tabmwp" and task.paper)
    assert task.measure == ("choices" if task.folder == "commonsense" else "answer") == tasks.default_measure(name)
    assert all(form.sizes.keys() <= task.source.keys() for form in task.formats)
  assert set(tasks.NAMES) >= {"stories", "custom", *catalogue.TASKS}


def test_paper_note_once(monkeypatch, tmp_path, capsys):
  """Where a task's own place has other questions than the paper, this is said once."""
  rows = [("place", {"question": f"{i}?", "result_float": i}) for i in range(520)]
  monkeypatch.setattr(registry.sources, "read", lambda *_: iter(rows))
  registry._read.cache_clear()
  for _ in range(2):
    assert len(tasks.load("mawps", split="test")) == 520 == tasks.published_size("mawps", "test")
  assert capsys.readouterr().err == (
      "note: mawps: hf:MU-NLPC/Calc-mawps has 520 other questions than the paper's 2065, which are "
      "GAIR-NLP/math-evaluation-harness data/mawps/test.jsonl; give mawps=file:PATH for those\n")
  registry._read.cache_clear()
  with pytest.raises(UserError, match=r"task tabmwp is on no hub .* data/tabmwp/test.jsonl: give tabmwp=file:PATH"):
    tasks.load("tabmwp", split="test")


def test_options_follow_the_questions(tmp_path):
  """Options to score have the ids and the order of the questions."""
  rows = [CUSTOM | {"prompt": f"P{i}?", "gold": i % 2} for i in range(9)]
  source = f"file:{write(tmp_path / 'own.jsonl', [*rows, rows[0]])}"
  fields = {"question": "prompt", "answer": "gold", "choices": "opts"}
  choices = tasks.load_choices("custom", source=source, fields=fields, count=7, seed=3)
  examples = tasks.load("custom", split="test", source=source, fields=fields, kind="choice", count=7, seed=3)
  assert [(c.id, c.question, "AB"[c.gold]) for c in choices] == [(e.id, e.question, e.answer) for e in examples]
  one = choices[0]
  assert (one.contexts, one.options) == ((f"Question: {one.question[:3]}\nAnswer:",), (" x", " y"))
  with pytest.raises(ValueError, match="holds 10 questions, 11 were asked for"):
    tasks.load_choices("custom", source=source, fields=fields, count=11)
  with pytest.raises(UserError, match=r"task custom has no options that can be scored; .*task.fields.choices"):
    tasks.load_choices("custom", source=f"file:{write(tmp_path / 'b.jsonl', [{'question': 'A?', 'answer': 'A'}])}")
  for name in ("stories", "gsm8k"):
    with pytest.raises(UserError, match=f"task {name} has no options that can be scored; expected one of mathqa"):
      tasks.load_choices(name, source=f"file:{write(tmp_path / 'a.jsonl', [gsm8k('A?')])}")
