"""Numbers in text: exact values, and hostile ones."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from imm_jax.tasks import answers


def right(text: str, gold: str, *, strict: bool = True) -> bool:
  return answers.verdict(text, gold, "number", strict=strict).correct


@pytest.mark.parametrize("number", [
    "1e999", "-1e999", "10^999", "10^{-999}", "1e-999", "1 × 10^999", "1e99999999999", "10^" + "9" * 5000, "2^9999",
    "9^65", "9^99999", "1e999 million", "9" * 21 + "^64", "1" + " 000" * 2000, "5, " * 10_000, "5 + " * 10_000,
    "1 = 1 + " * 5000, "9" * 5000, "1." + "3" * 5000, "1" + ",000" * 2000, "1/" + "3" * 5000, "1/1e-999", "0/0",
    "1/0.0", "5 0/0", "1/" * 5000, "9" * 400 + "e999", "\x00" * 1000 + "1", "1\x00", "٣", "²", "½", "∞", "nan",
    "inf", "1_000", "0x7", "__import__('os')", "-" * 10_000, "$" * 10_000, "= " * 10_000, "1" + " " * 10_000 + "1/",
    "{" * 10_000, "}" * 10_000, "\ud800"])
def test_huge_numbers_are_judged_at_once(number):
  """They may be beyond all bounds."""
  started = time.thread_time()
  for form in ("The answer is {}", "\\boxed{{{}}}", "{}", "The answer is 3 = {}", "7 {}"):
    answers.verdict(form.format(number), "12345", "number", strict=False)
    assert not right(form.format(number), "12345", strict=False)
  answers.parse_number(number)
  assert time.thread_time() - started < 3


def test_the_tail_of_a_run_of_digits_is_no_number():
  for count in (400, 401, 799, 800, 4300, 30_000):
    assert not right("1" * count + "7", "7", strict=False)
    assert not right("The answer is 7" + "7" * count, "7" * 400)


def test_a_number_of_four_hundred_digits_is_read():
  assert right("The answer is " + "9" * 400, "9" * 400)
  assert not right("The answer is " + "9" * 399, "9" * 400)


@settings(max_examples=200, deadline=None)
@given(value=st.decimals(-10**9, 10**9, places=3), gold=st.decimals(-10**9, 10**9, places=3),
       form=st.sampled_from(["The answer is {}.", "3 + 4 = {} #### {}", "\\boxed{{{}}}", "The answer is x = ${}$"]))
def test_number_is_right_iff_equal(value, gold, form):
  """A stated number is right exactly when it equals the gold answer."""
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
  # Groups of three digits are one number: 1 234.
  assert (answers.parse_number(f"{whole} {denominator}") is None) == (denominator < 100 or not 0 < abs(whole) < 1000)
