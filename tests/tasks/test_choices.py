"""Verdicts on multiple choice: which letters are answers."""

import pytest

from imm_jax.tasks import answers


def right(text: str, gold: str, *, strict: bool = True) -> bool:
  return answers.verdict(text, gold, "choice", strict=strict).correct


@pytest.mark.parametrize("text", [
    "The answer is B", "The answer is B.", "The answer is (B).", "The answer is [B]", "The answer is: B",
    "The answer is (b)", "The answer is b.", "The answer is **B**", "The answer is $B$", "The answer is option B.",
    "The answer is Choice (B)", "The answer is\nB", "The answer is (B) 12 km", "The answer is B) 12 km",
    "The answer is B: 12 km", "The answer is B 12 km", "The answer is B because A is less",
    "The answer is (B), as (A) is 5", "The answer is \"B\"", "The answer is B!", "The answer is B?",
    "The answer is (B), (E) is wrong.", "The answer is 42, which is option B.", "The correct option is (B).",
    "The correct choice is B.", "**Correct option**: B. The best choice is **B**",
    "\\boxed{B}", "\\boxed{\\text{B}}", "\\boxed{\\text{(B)}}", "\\boxed{(B)}", "#### B", "A: B",
    "Answer: B", "The answer is A. Wait, the answer is B.", "The answer is B.\n\nQ: Next?\nThe answer is C.",
    "Options:\nA: 12\nB: 14\nThe answer is B.", "The answer is:\nB: 14\nA: 12",
])
def test_an_anchored_letter_is_the_choice(text):
  correct, span = answers.verdict(text, "B", "choice", strict=True)
  assert correct
  assert span in ("b", "B")
  assert not right(text, "C")


@pytest.mark.parametrize("text", [
    "The answer is A", "The answer is A.", "The answer is A because it is less", "The answer is A, which is less",
    "The answer is A 12 km", "The answer is A is right", "The answer is (A) dog",
])
def test_letter_a_may_be_a_choice(text):
  """It is one where it is no article."""
  assert right(text, "A")


@pytest.mark.parametrize("text", [
    "The answer is A dog", "The answer is a dog", "The answer is a", "The answer is A Tale", "The answer is (A dog)",
    "The answer is Ann", "The answer is Bob", "The answer is 5 A", "The answer is not A", "The answer is AB",
    "The answer is A.M.", "The answer is a.m.", "The answer is A = 3", "The answer is A's", "The answer is A or B",
    "The answer is (A) and (B)", "The answer is A/B", "The answer is A, B", "The answer is A, B or C.",
    "The answer is (A), (E)", "The answer is (A), (E) or (C)", "The answer is 42, which is not option A",
    "The correct option is not A", "The correct option is a dog",
    "A is 5", "A dog", "Answers: A", "the A train", "(A) 5 (B) 6", "A", "(A)", "The answer is", "",
])
def test_any_other_capital_letter_is_no_choice(text):
  assert not right(text, "A")


@pytest.mark.parametrize("text", ["B", "(B)", "B.", "(B).", " B \n", "First A, then B.\n(B)"])
def test_bare_letters_count_in_evaluation(text):
  """They do not count when filtering."""
  assert right(text, "B", strict=False)
  assert not right(text, "B", strict=True)


@pytest.mark.parametrize("text", [
    "B) 42", "B. 42", "(B) 42 km, since 6 * 7 = 42", "**B) 42**", "It is 42.\nB) 42", "B) 42\nFor 6 * 7 = 42.",
    "Option B is correct.", "So option (B) is the right one.", "Answer **B** is the best.",
    "The answer is 42. Option B is correct."])
def test_only_option(text):
  """An only option, or one that is called correct, is a choice when evaluating."""
  assert right(text, "B", strict=False)
  assert not right(text, "B", strict=True)


@pytest.mark.parametrize("text", [
    "A B", "It is B", "B C", "(A) Tom 5 (B) Ann 6", "I think B.", "A) 41\nB) 42", "B) 42 or C) 43",
    "It is\nB) 42\nor so", "(B) 42 and C", "Option B is not correct.", "Option A is correct. Option B is correct.",
    "B is 42", "vitamin B is best", "B42", "B.42"])
def test_a_letter_in_running_text_is_no_choice(text):
  assert not right(text, "B", strict=False)


@pytest.mark.parametrize("text", [
    r"The answer is \(B\).", r"The correct answer is \( \text{B} \).", "The correct answer is:\n\n\\[ \\text{B} \\]",
    r"The answer is \[ \text{(B) } 42 \]", "The answer is ($B$)", "The answer is “B”."])
def test_letter_in_latex(text):
  """Letters in mathematics or quotes are read when filtering and when evaluating."""
  for strict in (True, False):
    assert answers.verdict(text, "B", "choice", strict=strict).correct
    assert not answers.verdict(text, "C", "choice", strict=strict).correct


@pytest.mark.parametrize("text", [
    "So x = 5.\n\n**B**", "Hence:\n**(B)**", "B is the correct answer.", "Hence (B) is correct."])
def test_bare_letter(text):
  """It counts where no marker is asked for, and so does one that is called correct."""
  assert answers.verdict(text, "B", "choice", strict=False).correct
  assert not answers.verdict(text, "B", "choice", strict=True).correct
