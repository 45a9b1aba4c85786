"""Tables and plots that studies of several methods and seeds share.

A table of scores is method -> {"ID": [seeds, rounds + 1], "OOD": the same}: accuracy in and out of domain of the base
and of the model that each round hands on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from imm_jax.report import figures, groups

Scores = Mapping[str, Mapping[str, np.ndarray]]
# Method -> color, marker and dash of its curve.
Style = Callable[[str, int], tuple[str, str, str]]


def format_mean(values: Iterable[float], sign: str = "") -> str:
  """Formats mean and standard error over seeds, of a single value only that; "+" shows the sign of a positive mean.

  >>> format_mean([0.5, 0.7]), format_mean([0.5], "+")
  ('0.600 ± 0.100', '+0.500')
  """
  mean, error = groups.mean_and_error(values := list(values))
  return f"{mean:{sign}.3f}" + f" ± {error:.3f}" * (len(values) > 1)


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Formats a Markdown table."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def tabulate_by_round(scores: Scores) -> str:
  """Tabulates the mean ID and OOD accuracy of the model that each round hands on."""
  rounds = range(max(of["ID"].shape[1] for of in scores.values()))
  head = ["by round", *(f"{domain} {t or 'base'}" for domain in ("ID", "OOD") for t in rounds)]
  return format_table(head, [[f"`{method}`", *(f"{of[domain][:, t].mean():.3f}" if t < of[domain].shape[1] else ""
                                               for domain in ("ID", "OOD") for t in rounds)]
                             for method, of in scores.items()])


def make_front(scores: Scores, style: Style) -> figures.Panel:
  """Makes a panel of mean ID against mean OOD accuracy, with a line through each method's rounds."""
  lines = tuple(figures.Curve(name, *style(name, i), tuple(of["ID"].mean(0)), tuple(of["OOD"].mean(0)))
                for i, (name, of) in enumerate(scores.items()))
  return figures.Panel("base and each round's model", "accuracy in domain", "accuracy out of domain", lines,
                       shares=True, named=True, counts=False)


def make_rounds(scores: Scores, style: Style, *, shares: bool = True) -> list[figures.Panel]:
  """Makes two panels of mean accuracy by round, in and out of domain, with standard errors over seeds."""
  panels = []
  for domain, title in (("ID", "in domain"), ("OOD", "out of domain")):
    lines = []
    for i, (name, of) in enumerate(scores.items()):
      means = [groups.mean_and_error(values) for values in of[domain].T]
      lines.append(figures.Curve(name, *style(name, i), tuple(range(len(means))), tuple(m for m, _ in means),
                                 tuple(m - e for m, e in means), tuple(m + e for m, e in means)))
    panels.append(figures.Panel(title, "rounds done", "accuracy", tuple(lines), shares=shares))
  return panels
