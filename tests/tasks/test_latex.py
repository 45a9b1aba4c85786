"""Answers in LaTeX: where they stand in a text, which are equal, and which are not."""

import pytest
from hypothesis import example, given, settings, strategies as st

from imm_jax.tasks import answers, latex, workers


@pytest.fixture(scope="module")
def equal():
  pool = workers.Workers(1)
  yield pool.equal
  pool.close()


def right(span: str, gold: str, equal) -> bool:
  return answers.verdict(f"So $\\boxed{{{span}}}$.", gold, "latex", strict=True, equal=equal).correct


@pytest.mark.parametrize(("text", "inside"), [
    (r"\boxed{7}", "7"), (r"\boxed{\frac{1}{2}} and", r"\frac{1}{2}"), (r"\boxed{1}, no, \boxed{2}.", "2"),
    (r"\boxed 9$.", "9"), (r"$\boxed \pi$", r"\pi"), (r"\fbox{3}", "3"), (r"\boxed{a}\fbox{b}", "b"),
    (r"\boxed{\boxed{4}}", "4"), (r"\boxed {5}", "5"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\{1,2}", r"\{1,2"),
    (r"\boxed{}", ""), (r"\boxed{6", "6"), ("\\boxed", ""), (r"\boxedx{1}", None), ("none", None), ("", None),
])
def test_the_last_box_is_found(text, inside):
  assert latex.extract_last_boxed(text) == inside


@pytest.mark.parametrize(("solution", "gold"), [
    (r"so $\boxed{43_5.}$", "43_5"), (r"so $\boxed{ \frac{1}{5} }$.", r"\frac{1}{5}"),
    (r"$\boxed{\text{(E)},}$", r"\text{(E)}"),
    (r"$\boxed{}$", None), (r"$\boxed{ . }$", None), ("no box", None), (r"is \boxed 2$.", "2")])
def test_the_gold_answer_of_a_solution(solution, gold):
  assert latex.extract_gold(solution) == gold


@pytest.mark.parametrize(("span", "gold"), [
    (r"\frac12", r"\tfrac{1}{2}"), (r"\dfrac{1}{2}", "0.5"), ("1/2", r"\frac12"), ("½", r"\frac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"), (r"\frac{2}{4}", r"\frac{1}{2}"), (r"1\frac12", r"\frac{3}{2}"),
    ("1 1/2", "1.5"),
    ("0.333333", r"\frac13"), (".5", "0.5"), ("5.00", "5"), ("+5", "5"), ("−5", "-5"), ("007", "7"),
    (r"6.72 \times 10^{-5}", ".0000672"), (r"\frac\pi2", r"\frac{\pi}{2}"), ("10,000", r"10,\!000"),
    ("10{,}000", "10000"), (r"1\,000\,000", "1,000,000"), (r"11,\! 111,\! 100", "11111100"), (r"\$18.90", "18.90"),
    ("18.9", r"\$18.90"), (r"50\%", "50"), ("50", r"50\%"), ("50%", r"50\%"), ("0.5", r"50\%"), (r"\frac12", r"50\%"),
    (r"90^\circ", "90"), ("90°", r"90^{\circ}"), ("90", r"90\text{ degrees}"), ("5 cm", "5"), (r"5\text{ cm}^2", "5"),
    ("5", r"5\mbox{ inches}^2"), (r"99\pi", r"99\pi \text{ square inches}"), ("7 hours", r"7\text{ hours}"),
    (r"864 \text{ inches}^{2}", "864"), (r"\text{Even}", "even"), ("Evelyn", r"\text{Evelyn}"),
    (r"\text{(C)}", "C"), ("C", r"\text{(C)}"), (r"\textbf{(C)}", "(C)"), (r"\mathbf{2340}", "2340"),
    ("x=5", "5"), ("5", "x = 5"), (r"\theta = 30^\circ", "30"), ("y=2x+3", "2x+3"), ("f(x) = 2x", "2x"),
    (r"x \in [1,2)", "[1,2)"), ("5 + 3 = 8", "8"), ("2x-y=0", "y=2x"),
    ("9x^2-16y^2=144", r"\frac{x^2}{16}-\frac{y^2}{9}=1"),
    ("1,2", "2, 1"), (r"\{2,1\}", r"\{1, 2\}"), ("1, 2", r"\{2,1\}"), (r"1 \text{ and } 2", "1,2"),
    ("1 or 2", r"2\text{ or }1"),
    (r"2, 3, \text{ and } 4", "2,3,4"), (r"\text{B, A}", r"\text{A,B}"), (r"1+\sqrt{2}, 1-\sqrt2", r"1 \pm \sqrt{2}"),
    (r"\{1+\sqrt5, -2, 1-\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"), ("(1, 2)", r"\left( 1,2 \right)"),
    (r"(0.5,2)", r"(\frac12,2)"),
    (r"[0,7)\cup\{-1\}", r"\{-1\} \cup [0,7)"), (r"(-∞, 3) ∪ (3, ∞)", r"(-\infty,3)\cup(3,\infty)"),
    (r"\begin{bmatrix} 1 \\ 0.5 \end{bmatrix}", r"\begin{pmatrix}1\\ \frac12\end{pmatrix}"),
    (r"\begin{pmatrix} 1/3 & 2 \end{pmatrix}", r"\begin{pmatrix}\frac13&2\end{pmatrix}"),
    (r"\sqrt8", r"2\sqrt{2}"), ("x^2 - 1", "(x-1)(x+1)"), (r"\frac{\cos x}{\sin x}", r"\cot x"), ("2i+3", "3+2i"),
    ("5!", "120"),
    (r"x^{2}", "x^2"), (r"43_{5}", "43_5"), (r"\\frac{1}{2}", r"\frac12"), (r"\displaystyle 5", "5"), ("5.", "5"),
    (r"x \leq 3", r"x \le 3"), ("10 : 15", "2:3"), ("8:34", r"8\!:\!34"), (r"\dbinom{31}{28}", r"\binom{31}{28}"),
    (r"\boxed{5}", "5"), ("24?", "24"), (r"8:34 \text{ p.m.}", "8:34"), (r"15\mbox{ cm}^2", "15^2"),
    (r"\frac{12}{5,\!525}", r"\frac{12}{5,525}"),
    (r"x \ge 2", r"[2,\infty)"), ("2 ≤ x", r"[2,\infty)"), (r"[2,\infty)", r"x \ge 2"), ("x > 2", r"(2,\infty)"),
    (r"x \leq -\frac12", r"(-\infty,-\frac{1}{2}]"), ("2 > x", r"(-\infty,2)"), (r"1 < x \le 3", "(1,3]"),
    (r"3 \ge x > 1", "(1,3]"), (r"\varnothing", r"\emptyset"), ("∅", r"\varnothing"),
    (r"1010_{\text{two}}", "1010_2"), (r"43_5", r"43_{\text{five}}"), (r"0.\overline{3}", r"\frac13"),
    (r"\frac{1}{6}", r"0.1\overline{6}"), (r"1.\bar{3}", r"\frac43"), (r"0.333333", r"0.\overline{3}"),
    (r"5\text{ inches}", r"5\text{ in}"), (r"5\text{ cm}^2", r"5\text{ cm}"), ("X = 5", "x=5"),
    (r"y=\frac{x}{2}", "x=2y"), ("100,200", "100, 200"),
])
def test_equal_answers_are_accepted(span, gold, equal):
  assert right(span, gold, equal)


@pytest.mark.parametrize(("span", "gold"), [
    ("1000001", "1000000"), ("1000000.5", "1000000"), (r"\frac{1}{1000003}", r"\frac{1}{1000004}"),
    ("6", "5"), ("-5", "5"), ("0.3333", r"\frac13"), (".0000671", ".0000672"), ("5.01", "5"), ("1,2", "12"),
    ("1 2", "12"),
    (r"63\pi", "63"), ("63", r"63\pi"), ("2i", "2"), (r"2\mathrm{i}", "2"), ("2xy", "2"), ("5", r"0.05\%"),
    ("43_6", "43_5"), ("43", "53_6"), (r"\sqrt{2}", "2"), ("x", "y"), (r"\text{Odd}", r"\text{Even}"),
    ("(B)", r"\text{(C)}"),
    ("(2,1)", "(1,2)"), ("[1,2]", "(1,2)"), ("[1,2]", "[1,2)"), ("1", "1,2"), ("1,2,3", "1,2"),
    (r"\{1,3\}", r"\{1,2\}"),
    (r"1+\sqrt2", r"1\pm\sqrt2"), (r"[0,7)", r"\{-1\}\cup[0,7)"), ("x^2+y^2=13", "13"), ("x+2y-9=0", "0"),
    ("y=3", "x=4"),
    (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("x^2+1", "(x-1)(x+1)"),
    ("2:40", "1:20"),
    (r"8:34\text{ a.m.}", r"8:34\text{ p.m.}"), ("5!", "5"), ("10^2", "10"), ("1/0", "1"), (r"\frac{1}{0}", "0"),
    ("", "5"),
    ("5", ""), (" ", " "), ("{", "5"), ("}5{", "5"), (r"\{1", r"\{1\}"), ("5" * 2000, "5"), (r"\emptyset", "0"),
    ("|x|", "x"),
    (r"3\text{ or }4", "3"), ("nan", "5"), ("oo", "5"),
    ("x > 2", r"[2,\infty)"), (r"x \le 2", r"[2,\infty)"), (r"1 < x > 3", "(1,3)"), (r"x \ge 3", r"[2,\infty)"),
    (r"1010_{\text{two}}", "1010_3"), (r"0.\overline{3}", "0.3"), (r"0.\overline{6}", r"\frac13"),
    (r"5\overline{3}", r"\frac{16}{3}"),
    ("1, 234", "1234"), ("x=5", "y=5"), (r"5\text{m}", r"5\text{ cm}"), (r"5\text{ cents}", r"5\text{ dollars}"),
])
def test_other_answers_are_not(span, gold, equal):
  assert not right(span, gold, equal)


@pytest.mark.parametrize(("text", "span"), [
    ("Final Answer: The final answer is $2 - 3i.$ I hope it is correct.", "2 - 3i."),
    ("The answer is $6$ centimeters. Done.", "6  centimeters"),
    ("The answer is the point $(1, 2)$.", "(1, 2)"),
    (r"The answer is: \(\frac{1}{2}\).", r"\frac{1}{2}"),
    ("The answer is\n\\[ x = 5 \\]\nas asked.", "x = 5"),
    (r"#### \frac{1}{2}", r"\frac{1}{2}"),
    (r"**Answer:** 3.5", "3.5"),
    (r"\boxed{3}? No: the answer is $4$.", "4"),
    (r"The answer is $4$, as \boxed{5} shows.", "5"),
    ("The answer is 7.\n\n### Instruction:\nNext\nThe answer is 8.", "7"),
    ("The answer is 4, as 2+2=4.", "4"),
    ("The answer is $4$, since $2+2=4$.", "4"),
    ("The answer is the point $(1, 2)$, which we get from $x=1$.", "(1, 2)"),
    ("The answer is $4$. This answer is correct.", "4"),
    ("The answer is 4. To check the answer: $4=2+2$.", "4"),
    (r"Thus \boxed{5}. ###### and so on", "5"),
    (r"Thus \boxed{5}. We see that the answer is correct.", "5"),
    (r"Thus \boxed{5}. Let us check our answer: for $n=7$ we get 35.", "5"),
])
def test_the_stated_answer_is_judged(text, span):
  assert answers.verdict(text, "0", "latex", strict=True, equal=lambda *_: False) == (False, span)


@pytest.mark.parametrize(("text", "span"), [
    ("Hence $x=3$, so there are $4$.", "4"), ("So it is\n\\(\\frac{1}{2}\\)", r"\frac{1}{2}"),
    ("So there are 12.", "12"),
    ("5", "5"), (r"\frac{1}{2}", r"\frac{1}{2}"), ("It is $5$ and that is all there is.", ""), ("No idea", ""),
    ("", ""),
    ("We get $1+1=2", ""),
])
def test_conclusion_counts_in_evaluation(text, span):
  """Without a marker it counts there, and not when filtering."""
  assert answers.verdict(text, "0", "latex", strict=False, equal=lambda *_: False).span == span
  assert answers.verdict(text, "0", "latex", strict=True, equal=lambda *_: False) == (False, "")


_PIECES = st.sampled_from([
    "\\boxed{", "\\frac", "\\frac{", "\\text{", "}", "{", "\\{", "\\left(", "$", "\\\\", "^", "_", "1", "12", ",",
    ",\\!000", "\\pm", "\\begin{pmatrix}", "&", "x", "=", "%", ".", " ", "and", "\x00", "\ud800", "½"])


@settings(max_examples=300, deadline=2000)
@given(text=st.one_of(st.text(), st.lists(_PIECES, max_size=30).map("".join)))
@example(text="\\frac{1}{0}")
@example(text="1" * 5000)
def test_any_text_is_read_and_spelled(text):
  box = latex.extract_last_boxed(text)
  assert box is None or box in text
  assert latex.normalize(text) == latex.normalize(f" {text}")
  assert latex.compare_spelling("7", text) in (True, False, None)
  assert latex.compare_spelling(text, "7") in (True, False, None)
  assert latex.extract_stated(text[:500]) == latex.extract_stated(f"  {text[:500]}")
  assert len(latex.extract_concluded(text)) <= 2 * latex.MAX_CHARS
  latex.extract_gold(text)


@settings(max_examples=100, deadline=2000)
@given(p=st.integers(-999, 999), q=st.integers(1, 99), form=st.sampled_from([
    r"\frac{{{p}}}{{{q}}}", r"\dfrac{{{p}}}{{{q}}}", "{p}/{q}", r"x = \tfrac{{{p}}}{{{q}}}", r"$\frac{{{p}}}{{{q}}}$ ",
    r"\left. \frac{{{p}}} {{{q}}}\text{{ cm}}"]))
def test_fractions_equal_only_themselves(p, q, form):
  """They do so in every spelling."""
  span = form.format(p=p, q=q)
  assert latex.compare_spelling(rf"\frac{{{p}}}{{{q}}}", span)
  assert latex.compare_spelling(rf"\frac{{{p + 1}}}{{{q}}}", span) is not True
