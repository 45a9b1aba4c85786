"""Paired comparison of two models: the statistics against other ways to them, and answers on disk."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from imm_jax.errors import UserError
from imm_jax.statistics import model_comparison
from imm_jax.statistics.paired_tests import compare_paired, holm, mcnemar
from tests import REPO


def pairs_of(wins: int, losses: int, n: int) -> tuple[list[int], list[int]]:
  return [1] * wins + [0] * (n - wins), [0] * wins + [1] * losses + [0] * (n - wins - losses)


def test_mcnemar_is_the_published_one_and_scipys():
  # Fagerland et al. (2013), table 1: airway hyper-responsiveness before and after stem cell transplantation.
  assert mcnemar(1, 7) == pytest.approx(0.0391, abs=5e-5)
  for wins, losses in [*itertools.product((0, 1, 4, 13), (2, 9, 30)), (480, 391), (20_000, 20_500)]:
    n, fewer = wins + losses, min(wins, losses)
    exact = stats.binomtest(wins, n, 0.5).pvalue
    assert mcnemar(wins, losses) == pytest.approx(exact - stats.binom.pmf(fewer, n, 0.5), rel=1e-8)
    assert mcnemar(losses, wins) == mcnemar(wins, losses)


@pytest.mark.parametrize(("wins", "losses"), [(5, 0), (6, 2), (3, 7)])
def test_mcnemar_counts_the_ways_to_swap_the_models(wins: int, losses: int):
  sums = [abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=wins + losses)]
  seen = abs(wins - losses)
  assert mcnemar(wins, losses) == np.mean([(s > seen) + (s == seen) / 2 for s in sums])


def test_equally_right_models_do_not_differ():
  assert [mcnemar(k, k) for k in (0, 1, 2, 50)] == [1, 1, 1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_like_intersections(ps: list[float]):
  """Closed testing with Bonferroni's test of each intersection, which Holm's procedure is."""
  sets = [s for k in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), k)]
  closed = [max(min(1, len(s) * min(ps[j] for j in s)) for s in sets if i in s) for i in range(len(ps))]
  assert holm(ps) == pytest.approx(closed)


@pytest.mark.parametrize(("wins", "losses", "n"), [(8, 3, 40), (30, 5, 60), (0, 4, 200), (1, 0, 6), (70, 61, 500)])
def test_verdict_interval_is_of_all_resamples(wins: int, losses: int, n: int):
  distribution = np.ones(1)  # of wins - losses, from -n to n
  for _ in range(n):
    distribution = np.convolve(distribution, [losses / n, (n - wins - losses) / n, wins / n])
  ends = [(np.searchsorted(np.cumsum(distribution), q) - n) / n for q in (0.025, 0.975)]
  found = compare_paired(*pairs_of(wins, losses, n))
  np.testing.assert_allclose([found.low, found.high], ends, atol=1.001 / n)
  assert (found.value, found.n, found.wins, found.losses) == ((wins - losses) / n, n, wins, losses)
  assert found.low <= found.value <= found.high


def test_rates_are_compared_as_scipy_does():
  rng = np.random.default_rng(3)
  tokens = rng.integers(5, 200, 80).astype(float)
  first = rng.gamma(4, 0.6, 80)
  second = first + rng.normal(0.05, 0.3, 80)
  found = compare_paired(first, second, tokens)
  assert found.first == pytest.approx((first * tokens).sum() / tokens.sum())
  assert found.value == pytest.approx(found.first - found.second)
  ratio = lambda a, b, w, axis: (w * (a - b)).sum(axis) / w.sum(axis)
  other = stats.bootstrap((first, second, tokens), ratio, paired=True, method="percentile", n_resamples=10_000,
                          rng=np.random.default_rng(1)).confidence_interval
  np.testing.assert_allclose([found.low, found.high], other, atol=0.06 * (other.high - other.low))
  assert (found.wins, found.losses) == (None, None)
  swapped = stats.permutation_test(((first - second)[:12],), np.sum, permutation_type="samples", n_resamples=np.inf)
  assert compare_paired(first[:12], second[:12]).p == pytest.approx(swapped.pvalue, rel=1e-12)  # all subsets
  assert compare_paired(second, first, tokens).p == found.p
  assert compare_paired(first, second, tokens) == found


def test_intervals_and_p_keep_what_they_promise():
  """Over 500 test sets of 150 questions: of a true difference, and of none."""
  rng = np.random.default_rng(0)
  found = [compare_paired(*pairs_of(wins, losses, 150))
           for wins, losses, _ in rng.multinomial(150, [0.2, 0.1, 0.7], 500)]
  assert 0.92 < np.mean([d.low <= 0.1 <= d.high for d in found]) < 0.975
  ps = [mcnemar(wins, losses) for wins, losses, _ in rng.multinomial(150, [0.1, 0.1, 0.8], 1000)]
  assert 0.03 < np.mean(np.array(ps) < 0.05) < 0.06


@settings(max_examples=20)
@given(st.integers(1, 300))
def test_unanimous_questions_leave_room(n: int):
  """Where all questions end alike, the interval has room for others."""
  same = compare_paired([1] * n, [1] * n)
  assert (same.value, same.p, same.low) == (0, 1, -same.high)
  assert (1 - same.high)**n == pytest.approx(0.05)  # with such a share of others, n in a row end alike in 5 %
  better = compare_paired([1] * n, [0] * n)
  assert better.high == better.value == 1
  assert 1 - better.low == pytest.approx(2 * same.high)


@pytest.mark.parametrize("given_", [([], []), ([1], [1, 0]), ([1, 0.5], [float("nan"), 1]), ([1], [0], [0]),
                                    ([[1]], [[0]])])
def test_what_is_no_list_of_pairs_is_refused(given_):
  with pytest.raises(ValueError, match="expected"):
    compare_paired(*given_)


def write(folder: Path, task: str, verdicts: str, *, first: int = 0, **fields: object) -> Path:
  """A file of answers; verdicts are right (1) or wrong (0), of questions from number `first` on."""
  folder.mkdir(exist_ok=True, parents=True)
  rows = [{"id": f"{task}/{q}", "question": f"How much is {q} + 1?", "gold": str(q + 1), "correct": v == "1"} | fields
          for q, v in enumerate(verdicts, first)]
  (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def compare(a: Path, b: Path, **options) -> model_comparison.Comparison:
  return model_comparison.compare(model_comparison.read_folder(a), model_comparison.read_folder(b), **options)


def test_two_folders_task_by_task(tmp_path: Path):
  a, b = tmp_path / "a", tmp_path / "b"
  for task, ours, theirs in (("add", "1111111110", "0000000011"), ("sub", "1100", "1010"), ("mul", "1110", "0000")):
    write(a, task, ours)
    write(b, task, theirs)
  write(a, "alone", "10")
  write(a, "add_samples", "0000")
  (b / "scores.json").write_text("{}")
  found = compare(a, b, pooled={"both": ["sub", "mul", "elsewhere"], "one": ["sub"]})
  lines = {line.label: line for line in found.lines}
  assert list(lines) == ["add", "mul", "sub", "both"]
  assert [(d.n, d.wins, d.losses) for d in (line.paired for line in found.lines)] == [
      (10, 8, 1), (4, 3, 0), (4, 1, 1), (8, 4, 1)]
  assert [line.p for line in found.lines] == holm([line.paired.p for line in found.lines])
  assert lines["add"].paired.p < 0.05 < lines["add"].p  # which is real but for the others
  assert not any(line.significant for line in found.lines)
  assert found.notes == (f"not compared, because {b} has no answers to it: alone",)
  alone = compare(a, write(tmp_path / "c", "add", "0000000011"))
  assert [line.significant for line in alone.lines] == [True]


def test_missing_questions_are_left_out(tmp_path: Path):
  """One model lacks them; a line says so."""
  a, b = write(tmp_path / "a", "add", "110011"), write(tmp_path / "b", "add", "0000", first=4)
  found = compare(a, b)
  assert [(line.paired.n, line.paired.wins) for line in found.lines] == [(2, 2)]
  assert found.notes == (f"add: compared on the 2 questions that both answered; 4 only in {a}/add.jsonl (add/0, "
                         f"add/1, add/2 and 1 more); 2 only in {b}/add.jsonl (add/6, add/7)",)


@pytest.mark.parametrize(("other", "said"), [
    ({"gold": "7"}, "of 4 shared ids 4 have another question or another gold answer in the other"),
    ({"question": "Why?"}, "of 4 shared ids 4 have another question or another gold answer"),
    ({"first": 9}, r"share no question; the first has 4 \(add/0, add/1, add/2 and 1 more\), the second 4"),
    ({"id": "add/0"}, "question add/0 is duplicated"),
    ({"correct": None}, "add.jsonl:1: 'correct' is missing or no number"),
    ({"correct": float("inf")}, "add.jsonl:1: 'correct' is missing or no number"),
    ({"id": 3}, "add.jsonl:1: 'id' is missing"),
    ({"task": "sub"}, "no task has answers of both: .*a has add; .*b has sub")])
def test_what_are_not_the_same_questions_is_refused(tmp_path: Path, other: dict, said: str):
  a, b = write(tmp_path / "a", "add", "1100"), write(tmp_path / "b", **{"task": "add", "verdicts": "0110"} | other)
  with pytest.raises(UserError, match=said):
    compare(a, b)


def test_other_scores_have_their_own_lines(tmp_path: Path):
  """They are the other scores of a row of answers."""
  a, b = write(tmp_path / "a", "arc", "110", correct_norm=1.0), write(tmp_path / "b", "arc", "100", correct_norm=0.0)
  for folder, change in ((a, 0.0), (b, 0.5)):
    rows = [{"id": str(i), "nats": 2.0 * n + change * n, "bytes": n} for i, n in enumerate((10, 20, 70))]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = {line.label: line.paired for line in compare(a, b).lines}
  assert list(found) == ["arc", "arc, correct_norm", "text, nats per bytes"]
  assert [(d.first, d.second) for d in found.values()] == [(2 / 3, 1 / 3), (1, 0), (2, 2.5)]
  (b / "text.jsonl").write_text((b / "text.jsonl").read_text().replace('"bytes": 20', '"bytes": 21'))
  with pytest.raises(UserError, match="their bytes differ, as of other texts"):
    compare(a, b)


def test_folder_without_answers_is_helpful(tmp_path: Path):
  """It says where some are."""
  for name in ("base/eval", "round_0/eval/sft"):
    write(tmp_path / "run" / name, "add", "10")
  (tmp_path / "run/metrics.jsonl").write_text("{}\n")
  with pytest.raises(UserError, match=r"is no folder of answers .* one of .*run/base/eval, .*run/round_0/eval/sft"):
    model_comparison.read_folder(tmp_path / "run")
  with pytest.raises(UserError, match="a folder such as RUN/base/eval"):
    model_comparison.read_folder(tmp_path / "none")


def test_a_file_that_has_changed_is_read_again(tmp_path: Path):
  folder = write(tmp_path, "add", "10")
  assert len(model_comparison.read_answers(folder / "add.jsonl").fingerprints) == 2
  assert len(model_comparison.read_answers(write(tmp_path, "add", "100") / "add.jsonl").fingerprints) == 3


def command(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-m", "imm_jax.compare", *flags], cwd=REPO, capture_output=True, text=True,
                        check=False)


def test_the_command_prints_a_table_and_writes_it(tmp_path: Path):
  a, b = write(tmp_path / "a", "add", "1111111100"), write(tmp_path / "b", "add", "0000000010")
  done = command(f"--this={a}", f"--against={b}", f"--against={a}", f"--out={tmp_path / 'found.json'}")
  assert done.returncode == 0, done.stderr
  row = next(line for line in done.stdout.splitlines() if line.startswith("add"))
  assert row.split()[:5] == ["add", "10", "0.800", "0.100", "+0.700"]
  assert row.split()[-5:] == ["8", "1", "0.021", "0.021", "yes"]
  first, second = json.loads((tmp_path / "found.json").read_text())
  assert first["against"] == str(b)
  assert (first["tests"][0]["only_this"], first["tests"][0]["real"]) == (8, True)
  assert (second["tests"][0]["difference"], second["tests"][0]["real"]) == (0, False)
  assert "asked" not in done.stdout
  other = write(tmp_path / "c", "subtract", "0011")
  partly = command(f"--this={a}", f"--against={other}", f"--against={b}", f"--out={tmp_path / 'part.json'}")
  assert partly.returncode == 1  # one of the two can be compared, and is
  assert f"error: no task has answers of both: {a} has add; {other} has subtract" in partly.stderr
  assert row in partly.stdout.splitlines()
  assert json.loads((tmp_path / "part.json").read_text()) == [first]
  run = tmp_path / "run"
  merged = write(run / "round_0/eval/merged", "add", "1111111100")
  how = lambda name: {"protocol": {"add": {"name": name, "shots": 8, "n": 10, "mean_tokens": 4.0, "cut": 0.0}}}
  (a / "scores.json").write_text(json.dumps(how("harness")))
  (run / "run.json").write_text(json.dumps({"stages": {"round_0/eval/merged": {"facts": how("paper")}}}))
  done = command(f"--this={a}", f"--against={merged}")
  assert done.stdout.splitlines()[-1] == ("add: asked in other ways, this protocol harness with worked examples: 8; "
                                          "other protocol paper with worked examples: 8")
  same = how("paper")["protocol"]["add"] | {"chat": True, "max_new_tokens": 80}
  (a / "scores.json").write_text(json.dumps({"protocol": {"add": same}}))
  done = command(f"--this={a}", f"--against={merged}")
  assert ("this protocol paper with worked examples: 8, chat template, at most so many tokens: 80; other"
          in done.stdout.splitlines()[-1])
  for ours, theirs, said in (("0a", "0b", True), ("0a", "0a", False), ("0a", None, False)):
    for folder, digest in ((a, ours), (b, theirs)):
      found = how("paper")
      found["protocol"]["add"] |= {"shots_digest": digest} if digest else {}
      (folder / "scores.json").write_text(json.dumps(found))
    assert ("add: asked with other worked examples" in command(f"--this={a}", f"--against={b}").stdout) == said
  again = command(f"--this={a}", f"--against={b}", f"--out={tmp_path / 'found.json'}")
  assert again.returncode == 1
  assert again.stderr.startswith("error: --out=")
