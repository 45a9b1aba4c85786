"""Verdicts on single answers, and on hostile text."""

import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings, strategies as st

from imm_jax.tasks import answers


def right(text: str, gold: str, kind: str = "number", *, strict: bool = True) -> bool:
  return answers.verdict(text, gold, kind, strict=strict).correct


@pytest.mark.parametrize(("text", "gold"), [
    ("The answer is 7.", "7"),
    ("the Answer is: 7", "7"),
    ("The answer is\n\n7", "7"),
    ("So it is 3.\n#### 7", "7"),
    ("16 - 9 = <<16-9=7>>7\nA: 7", "7"),
    ("It takes 5 days. A: 7", "7"),
    ("**Answer:** 7 apples", "7"),
    ("Final Answer: The final answer is $7$. I hope it is correct.", "7"),
    ("The answer is 5. No: the answer is 7.", "7"),
    ("#### 5\nThe answer is 7.", "7"),
    ("The answer is 5. Checked: \\boxed{7}", "7"),
    ("so \\fbox{7} of 9", "7"),
    ("so $\\boxed 7$ of 9", "7"),
    ("The answer is 7. ###### 5", "7"),
    ("\\boxed{5} is too low. The answer is 7.", "7"),
    ("so \\boxed{\\text{about } {7}} of 9", "7"),
    ("so \\boxed {7", "7"),
    ("The answer is 3+4=7.", "7"),
    ("The answer is x = 3 + 4 = 7 apples.", "7"),
    ("The answer is 7 = x", "7"),
    ("The answer is 1,234.", "1234"),
    ("The answer is 1,234,567.5", "1234567.5"),
    ("The answer is 12,345, not 12", "12345"),
    ("The answer is 10{,}000", "10000"),
    ("The answer is 10,\\!000", "10000"),
    ("The answer is $7.00.", "7"),
    ("The answer is \\$7", "7"),
    ("The answer is €7", "7"),
    ("The answer is 50%.", "50"),
    ("The answer is 50\\%.", "50"),
    ("The answer is 7km", "7"),
    ("The answer is .5", "0.5"),
    ("The answer is 007", "7"),
    ("The answer is 1/2.", "0.5"),
    ("The answer is 1 / 3", "0.33333"),
    ("The answer is \\frac{1}{2}", "0.5"),
    ("The answer is $-\\dfrac{1}{2}$", "-0.5"),
    ("The answer is 3 1/2 hours", "3.5"),
    ("The answer is 3\\frac{1}{2}", "3.5"),
    ("The answer is 3½", "3.5"),
    ("The answer is ¼ of it", "0.25"),
    ("The answer is 1,000/2,000", "0.5"),
    ("The answer is 3e2", "300"),
    ("The answer is 3E-2", "0.03"),
    ("The answer is 3 × 10^2", "300"),
    ("The answer is 1.5 \\times 10^{-3}", "0.0015"),
    ("The answer is 2*10^3", "2000"),
    ("The answer is 10^{3}", "1000"),
    ("The answer is -7", "-7"),
    ("The answer is - 7", "-7"),
    ("The answer is −7", "-7"),
    ("The answer is –7", "-7"),
    ("The answer is -$7", "-7"),
    ("The answer is $-7", "-7"),
    ("The answer is 5 - 12 = -7", "-7"),
    ("The answer is 7.00005", "7"),
    ("The answer is $7 = 12 - 5$", "7"),
    ("The answer is 7, 5 of which are red", "7"),
    ("The answer is negative 7", "-7"),
    ("The answer is **minus 7**", "-7"),
    ("#### negative 7", "-7"),
    ("The answer is \\[\n7\n\\]", "7"),
    ("The answer is:\n$$\n3 + 4 = 7\n$$", "7"),
    ("The answer is 7.5 to 1 decimal place.", "7.5"),
    ("\\boxed{\\text{minus 7}}", "-7"),
    ("The answer is 2.5 million", "2500000"),
    ("The answer is $3 Thousand.", "3000"),
    ("The answer is $42k.", "42000"),
    ("The answer is $42k$", "42"),  # a variable in a formula
    ("The answer is 1 234", "1234"),
    ("The answer is 1 234 567.", "1234567"),
    ("The answer is 1\u00a0234 km", "1234"),
    ("The answer is 2^5", "32"),
    ("The answer is 2^{5}", "32"),
    ("The answer is -2^2", "-4"),
    ("The answer is 12. Check: 6+7=13.", "12"),
    ("The answer is $12$. Check: 6+7=13.", "12"),
    ("So the answer is 12. Wait, no, let me recompute. 7+6=13. So it is 13.", "12"),
    ("This confirms the answer is 7", "7"),
    ("Answer: Tom has 3. He finds 4. 3 + 4 = 7.", "7"),
    ("The answer is 7.\n\n### Instruction:\nAnother\nThe answer is 5.", "7"),
    ("The answer is 7.\nQ: And 5?\nA: 5", "7"),
    ("The answer is 7.\n  Question: And?\nThe answer is 5.", "7"),
    ("The answer is 7." + "\nQ: x\nA: 5" * 10_000, "7"),
    ("The answer is 1.0", "1.0"),
    ("The answer is 1600", "1,600"),
    ("The answer is 7", "$7"),
    ("The answer is 7", "7%"),
])
def test_the_number_of_the_last_marker_is_read(text, gold):
  assert right(text, gold)


@pytest.mark.parametrize(("text", "gold"), [
    ("The answer is 7.0002", "7"),
    ("The answer is 1,23", "1"),
    ("The answer is 1,23", "123"),
    ("The answer is 12,34, or so", "12"),
    ("The answer is 1234,567", "1234"),
    ("The answer is 1,2,3", "1"),
    ("The answer is 1,234,56", "1234"),
    ("The answer is 1.2.3", "1.2"),
    ("The answer is 3 apples = 1,23", "3"),
    ("The answer is 3:30", "3"),
    ("The answer is 2:3", "2"),
    ("The answer is 1/2/2020", "0.5"),
    ("The answer is 2^5", "2"),
    ("The answer is 2^{0.5}", "1"),
    ("The answer is 2^{5x}", "32"),
    ("The answer is 2^3^2", "8"),
    ("The answer is 5 or 7", "5"),
    ("The answer is $5$ or $7$", "5"),
    ("The answer is between 5 and 7", "5"),
    ("The answer is 5 to 7", "5"),
    ("The answer is 5-7", "5"),
    ("The answer is $5-$7", "5"),
    ("The answer is 5, 6, 7", "5"),
    ("The answer is 5, 6 and 7", "5"),
    ("The answer is 3 + 4", "3"),
    ("The answer is 3 × 4", "3"),
    ("The answer is 3 \\cdot 4", "3"),
    ("The answer is 12 minus 5", "12"),
    ("The answer is not 42", "42"),
    ("The answer is negative 5", "5"),
    ("The answer is 2.5 million", "2.5"),
    ("The answer is $42k", "42"),
    ("The answer is 1 234", "1"),
    ("The answer is 1 234.5", "1"),
    ("The answer is 12-5", "12"),
    ("The answer is \\frac{10}{2\\sqrt{3}}", "10"),
    ("The answer is \\sqrt[3]{8}", "3"),
    ("The answer is 5. Wait, this answer is wrong.", "5"),
    ("The answer is 5. No: the answer is seven.", "5"),
    ("The answer is 5 at first. Then he gets more, so the answer is $", "5"),  # cut
    ("So the answer is 12. Wait, no, let me recompute. 7+6=13. So it is 13.", "13"),
    ("Let us verify the answer: 7", "7"),
    ("The answer is 10^3", "10"),
    ("The answer is 3\\sqrt{2}", "3"),
    ("The answer is \\sqrt{2}", "2"),
    ("The answer is 63\\pi", "63"),
    ("The answer is 2π", "2"),
    ("The answer is 10³", "10"),
    ("The answer is \\frac{1}{2}", "1"),
    ("The answer is 1/2", "1"),
    ("The answer is 1/0", "1"),
    ("The answer is 3 1/0", "3"),
    ("The answer is 12-5", "-5"),
    ("The answer is song7", "7"),
    ("The answer is -7", "7"),
    ("The answer is 7", "-7"),
    ("The answer is 3+4", "7"),  # text is never evaluated
    ("The answer is 7e99999", "7"),
    ("The answer is seven", "7"),
    ("The answer is Yes.\n7 apples", "7"),
    ("The answer is", "7"),
    ("", "7"),
    ("7", "7"),
    ("So there are 7.", "7"),
    ("\n### Instruction:\nThe answer is 7.", "7"),
    ("candies of type A: 7", "7"),
])
def test_unstated_numbers_fail_the_filter(text, gold):
  """A text that states no such number is wrong when filtering."""
  assert not right(text, gold)


@pytest.mark.parametrize("rest", [
    " This answer is correct.", " This answer is reasonable, for 3 < 5.", "\n\nNote: the answer is rounded.",
    " I hope this helps! If the answer is unclear, let me know.", " To check the answer: 42/6 = 7.",
    " Let me verify my final answer: 42/6 = 7.", "\nThe answer is rounded. The answer is exact."])
@pytest.mark.parametrize("stated", ["So \\boxed{42}.", "The answer is 42.", "#### 42\n"])
def test_later_mentions_do_not_count(stated, rest):
  """A later mention of an answer leaves the stated one."""
  assert right(stated + rest, "42")
  assert right(stated.replace("42", "B") + rest, "B", "choice")


def test_mentions_between_answers_leave_the_last_one():
  assert right("The answer is 5. This answer is rounded. The answer is 7. This answer is exact.", "7")
  assert right("\\boxed{7} is stated. The answer is 5. The answer is rounded.", "5")
  assert not right("The answer is 7. \\boxed{\\text{unknown}} This answer is rounded.", "7")  # a box is an answer
  assert right("Thus \\boxed{B}. This answer is correct since (A) fails.", "B", "choice")
  assert right("The answer is B. This answer is the only one.", "B", "choice")
  assert not right("The answer is B. The answer is A or B.", "B", "choice")
  assert not right("The answer is B. The answer is not B.", "B", "choice")


@pytest.mark.parametrize("start", ["\n### Instruction:", "\nQuestion:", "\n\n Q:", "\nProblem:", "\nUser:",
                                   "\n\tHuman:", "<|im_start|>user\n", "<|im_end|>\n<|im_start|> user"])
def test_a_text_ends_where_a_next_question_begins(start):
  kept = answers.before_next_question(f"Q: 2+5? It is 7.{start} 2+3?\nQ: x")
  assert kept.removesuffix("<|im_end|>\n").rstrip() == "Q: 2+5? It is 7."
  assert right(f"The answer is 7.{start} 2+3? The answer is 5.", "7")


@pytest.mark.parametrize("text", ["", "Q: 7", "User: 7", "The user: 7\nHumans: 8", "<|im_start|>assistant\n7\n"])
def test_text_without_a_question_is_whole(text):
  """A text without a next question is not cut."""
  assert answers.before_next_question(text) == text


@pytest.mark.parametrize(("text", "gold"), [
    ("7", "7"),
    ("So there are 5 + 2 = 7 apples.", "7"),
    ("So he lost 12-5", "5"),
    ("He pays $1,234", "1234"),
    ("There are 7 songs on the mp3 player.", "7"),
    ("He eats 7 of them at 12:30.", "7"),
    ("There are 7, not 12,34.", "7"),
    ("The answer is the number of boxes.\n\nTherefore, there are 7 boxes.", "7"),
    ("The profit is -7", "-7"),
    ("He has 7.\nQ: How many are 5?", "7"),
])
def test_last_number_counts_in_evaluation(text, gold):
  """Without a marker it counts there, and not when filtering."""
  assert right(text, gold, strict=False)
  assert not right(text, gold, strict=True)


@pytest.mark.parametrize(("text", "gold"), [
    ("The answer is Yes. \\boxed{No}, 7", "7"),  # a box is an answer, even where it is no number
    ("The answer is 1,23. That is 7.", "7"),  # so is a malformed number
    ("x7", "7"),
    ("v1.7", "7"),
    ("nothing", "0"),
])
def test_stated_answer_is_never_replaced(text, gold):
  """A later number does not count."""
  assert not right(text, gold, strict=False)


def test_the_span_is_what_was_judged():
  judge = lambda text: answers.verdict(text, "7", "number", strict=True).span
  assert judge("2+5=7. The answer is $7.00.") == "7.00"
  assert judge("The answer is -3 1/2 cups") == "-3 1/2"
  assert judge("There are 7.") == ""
  assert answers.verdict("The answer is (C).", "B", "choice", strict=True) == answers.Verdict(False, "C")


def test_votes_are_counted_by_value():
  same = lambda kind, *spans: len({answers.canonical(s, kind) for s in spans}) == 1
  assert same("number", "1,200", "$1200.0", "1 200", "1.2 thousand", "1.2e3")
  assert same("choice", "b", "B")
  assert same("latex", r"\frac12", "0.5", r"\frac{2}{4}", "x = 1/2", r"0.50\text{ cm}")
  assert same("latex", r"\frac13", r"0.\overline{3}")
  assert same("latex", r"2\sqrt2", r"2 \sqrt{2}")
  assert not same("latex", "1, 234", "1234")
  assert not same("latex", r"\frac12", r"\frac13")
  assert not same("number", "1", "2")
  assert {answers.canonical("", kind) for kind in ("number", "choice", "latex")} == {None}


def test_vote_is_the_judged_value():
  """The vote of a span is the value that was judged."""
  correct, span = answers.verdict("So he lost 12 -5", "5", "number", strict=False)
  assert correct == (answers.canonical(span, "number") == "5")
  assert answers.canonical(answers.verdict("It is 9-2", "2", "number", strict=False).span, "number") == "2"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("text", ["", "nothing", "The answer is 7."])
@pytest.mark.parametrize(("gold", "kind", "message"), [
    ("seven", "number", "not a number"), ("", "number", "not a number"), ("1/0", "number", "not a number"),
    ("2:3", "number", "not a number"), ("1,23", "number", "not a number"), ("b", "choice", "not a letter"),
    ("I", "choice", "not a letter"), ("", "choice", "not a letter"), ("7", "math", "kind='math'")])
def test_gold_of_another_kind_is_an_error(text, gold, kind, message, strict):
  """It is one whatever the text."""
  with pytest.raises(ValueError, match=message):
    answers.verdict(text, gold, kind, strict=strict)


_FRAGMENTS = ("1", ",111", "1,", " ", "\n", "\t", "- ", "$", ".", "= ", "/", "1/1", "^", "{", "}", "(", "**", "10^",
              "1e9", "x 10", "\\frac{1}{", "\\sqrt{", "\\boxed{", "The answer is ", "A:", "####", "B or ", "\\text{",
              "option", "\\", "\x00", "\nQ", "a", " 111", "1 or ", "is negative ", "not ", "check the answer: ",
              "correct option is ", "which is option ", "Option B is ", "\nB) ", "wait ", "<|im_start|>", "\\overline{",
              "x<", "1. A", "The answer is 1 ")


@pytest.mark.parametrize("kind", ["number", "latex", "choice"])
@pytest.mark.parametrize("fragment", _FRAGMENTS)
def test_a_megabyte_of_anything_is_judged_at_once(fragment, kind):
  started = time.thread_time()
  for start in ("", "The answer is ", "\\boxed{"):
    text = start + fragment * (1_000_000 // len(fragment))
    answers.verdict(text, "B" if kind == "choice" else "7", kind, strict=False, equal=lambda *_: False)
  assert time.thread_time() - started < 5


_WORDS = st.sampled_from([*_FRAGMENTS, "7", "B", "\\boxed{7}", "e", "−", "½", "Q:", "###", "/0", "^{", "😀"])


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.lists(_WORDS, max_size=30).map("".join)), strict=st.booleans())
@example(text="The answer is 1/0", strict=False)
@example(text="\\boxed{" * 3, strict=False)
def test_any_text_gets_a_verdict(text, strict):
  for gold, kind in (("7", "number"), ("B", "choice"), (r"\frac{1}{7}", "latex")):
    correct, span = answers.verdict(text, gold, kind, strict=strict, equal=lambda *_: False)
    assert isinstance(correct, bool)
    assert span or not correct
    value = answers.parse_number(text)
    assert value is None or isinstance(value, Fraction)
    if strict and correct:
      assert answers.verdict(text, gold, kind, strict=False, equal=lambda *_: False).correct
