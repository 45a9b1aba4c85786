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
    ("The answer is 12-5", "12"),
    ("The answer is 7.00005", "7"),
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
    ("The answer is 2^5", "32"),
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
def test_what_states_no_such_number_is_wrong_when_filtering(text, gold):
  assert not right(text, gold)


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
def test_without_a_marker_the_last_number_counts_only_when_evaluating(text, gold):
  assert right(text, gold, strict=False)
  assert not right(text, gold, strict=True)


@pytest.mark.parametrize(("text", "gold"), [
    ("The answer is Yes. \\boxed{No}, 7", "7"),  # a box is an answer, even where it is no number
    ("The answer is 1,23. That is 7.", "7"),  # so is a malformed number
    ("x7", "7"),
    ("v1.7", "7"),
    ("nothing", "0"),
])
def test_a_stated_answer_is_never_replaced_by_a_later_number(text, gold):
  assert not right(text, gold, strict=False)


@pytest.mark.parametrize("text", [
    "The answer is B", "The answer is B.", "The answer is (B).", "The answer is [B]", "The answer is: B",
    "The answer is (b)", "The answer is b.", "The answer is **B**", "The answer is $B$", "The answer is option B.",
    "The answer is Choice (B)", "The answer is\nB", "The answer is (B) 12 km", "The answer is B) 12 km",
    "The answer is B: 12 km", "The answer is B 12 km", "The answer is B because A is less",
    "The answer is (B), as (A) is 5", "The answer is \"B\"",
    "\\boxed{B}", "\\boxed{\\text{B}}", "\\boxed{\\text{(B)}}", "\\boxed{(B)}", "#### B", "A: B",
    "Answer: B", "The answer is A. Wait, the answer is B.", "The answer is B.\n\nQ: Next?\nThe answer is C.",
    "Options:\nA: 12\nB: 14\nThe answer is B.", "The answer is:\nB: 14\nA: 12",
])
def test_an_anchored_letter_is_the_choice(text):
  correct, span = answers.verdict(text, "B", "choice", strict=True)
  assert correct
  assert span in ("b", "B")
  assert not right(text, "C", "choice")


@pytest.mark.parametrize("text", [
    "The answer is A", "The answer is A.", "The answer is A because it is less", "The answer is A, which is less",
    "The answer is A 12 km", "The answer is A is right", "The answer is (A) dog",
])
def test_the_letter_a_is_a_choice_where_it_is_no_article(text):
  assert right(text, "A", "choice")


@pytest.mark.parametrize("text", [
    "The answer is A dog", "The answer is a dog", "The answer is a", "The answer is A Tale", "The answer is (A dog)",
    "The answer is Ann", "The answer is Bob", "The answer is 5 A", "The answer is not A", "The answer is AB",
    "The answer is A.M.", "The answer is a.m.", "The answer is A = 3", "The answer is A's", "The answer is A or B",
    "The answer is (A) and (B)", "The answer is A/B", "The answer is A, B", "The answer is A, B or C.",
    "A is 5", "A dog", "Answers: A", "the A train", "(A) 5 (B) 6", "A", "(A)", "The answer is", "",
])
def test_any_other_capital_letter_is_no_choice(text):
  assert not right(text, "A", "choice")


@pytest.mark.parametrize("text", ["B", "(B)", "B.", "(B).", " B \n", "First A, then B.\n(B)"])
def test_a_bare_letter_is_a_choice_only_when_evaluating(text):
  assert right(text, "B", "choice", strict=False)
  assert not right(text, "B", "choice", strict=True)


@pytest.mark.parametrize("text", ["A B", "It is B", "B C", "(A) Tom 5 (B) Ann 6", "I think B."])
def test_a_letter_in_running_text_is_no_choice(text):
  assert not right(text, "B", "choice", strict=False)


def test_the_span_is_what_was_judged():
  judge = lambda text: answers.verdict(text, "7", "number", strict=True).span
  assert judge("2+5=7. The answer is $7.00.") == "7.00"
  assert judge("The answer is -3 1/2 cups") == "-3 1/2"
  assert judge("There are 7.") == ""
  assert answers.verdict("The answer is (C).", "B", "choice", strict=True) == answers.Verdict(False, "C")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("text", ["", "nothing", "The answer is 7."])
@pytest.mark.parametrize(("gold", "kind", "message"), [
    ("seven", "number", "not a number"), ("", "number", "not a number"), ("1/0", "number", "not a number"),
    ("2:3", "number", "not a number"), ("1,23", "number", "not a number"), ("b", "choice", "not a letter"),
    ("I", "choice", "not a letter"), ("", "choice", "not a letter"), ("7", "math", "kind='math'")])
def test_a_gold_answer_of_another_kind_is_an_error_whatever_the_text(text, gold, kind, message, strict):
  with pytest.raises(ValueError, match=message):
    answers.verdict(text, gold, kind, strict=strict)


@pytest.mark.parametrize("number", [
    "1e999", "-1e999", "10^999", "10^{-999}", "1e-999", "1 × 10^999", "1e99999999999", "10^" + "9" * 5000, "9" * 5000,
    "1." + "3" * 5000, "1" + ",000" * 2000, "1/" + "3" * 5000, "1/1e-999", "0/0", "1/0.0", "5 0/0", "1/" * 5000,
    "9" * 400 + "e999", "\x00" * 1000 + "1", "1\x00", "٣", "²", "½", "∞", "nan", "inf", "1_000", "0x7",
    "__import__('os')", "-" * 10_000, "$" * 10_000, "= " * 10_000, "1" + " " * 10_000 + "1/", "{" * 10_000,
    "}" * 10_000, "\ud800"])
def test_numbers_beyond_all_bounds_are_judged_at_once(number):
  started = time.process_time()
  for form in ("The answer is {}", "\\boxed{{{}}}", "{}", "The answer is 3 = {}", "7 {}"):
    answers.verdict(form.format(number), "12345", "number", strict=False)
    assert not right(form.format(number), "12345", strict=False)
  answers.parse_number(number)
  assert time.process_time() - started < 0.5


_FRAGMENTS = ("1", ",111", "1,", " ", "\n", "\t", "- ", "$", ".", "= ", "/", "1/1", "^", "{", "}", "(", "**", "10^",
              "1e9", "x 10", "\\frac{1}{", "\\sqrt{", "\\boxed{", "The answer is ", "A:", "####", "B or ", "\\text{",
              "option", "\\", "\x00", "\nQ", "a")


@pytest.mark.parametrize("kind", ["number", "latex", "choice"])
@pytest.mark.parametrize("fragment", _FRAGMENTS)
def test_a_megabyte_of_anything_is_judged_at_once(fragment, kind):
  started = time.process_time()
  for start in ("", "The answer is ", "\\boxed{"):
    text = start + fragment * (1_000_000 // len(fragment))
    answers.verdict(text, "B" if kind == "choice" else "7", kind, strict=False, equal=lambda *_: False)
  assert time.process_time() - started < 1.0


def test_the_tail_of_a_run_of_digits_is_no_number():
  for count in (400, 401, 799, 800, 4300, 30_000):
    assert not right("1" * count + "7", "7", strict=False)
    assert not right("The answer is 7" + "7" * count, "7" * 400)


def test_a_number_of_four_hundred_digits_is_read():
  assert right("The answer is " + "9" * 400, "9" * 400)
  assert not right("The answer is " + "9" * 399, "9" * 400)


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


@settings(max_examples=200, deadline=None)
@given(value=st.decimals(-10**9, 10**9, places=3), gold=st.decimals(-10**9, 10**9, places=3),
       form=st.sampled_from(["The answer is {}.", "3 + 4 = {} #### {}", "\\boxed{{{}}}", "The answer is x = ${}$"]))
def test_a_stated_number_is_right_exactly_when_it_equals_the_gold(value, gold, form):
  text = form.format(*[f"{value:,}"] * 2)
  assert right(text, str(value))
  assert right(text, str(gold)) == (abs(Fraction(value) - Fraction(gold)) <= Fraction(1, 10_000))


@settings(max_examples=100, deadline=None)
@given(whole=st.integers(-10**6, 10**6), denominator=st.integers(1, 999), exponent=st.integers(-9, 9))
def test_parse_number_agrees_with_exact_arithmetic(whole, denominator, exponent):
  assert answers.parse_number(f"{whole}") == whole
  assert answers.parse_number(f" {whole:,} ") == whole
  assert answers.parse_number(f"{whole}/{denominator}") == Fraction(whole, denominator)
  assert answers.parse_number(f"{abs(whole)} 1/{denominator}") == abs(whole) + Fraction(1, denominator)
  assert answers.parse_number(f"{whole}e{exponent}") == whole * Fraction(10) ** exponent
  assert answers.parse_number(f"{whole} \\times 10^{{{exponent}}}") == whole * Fraction(10) ** exponent
  assert answers.parse_number(f"{whole} {denominator}") is None
