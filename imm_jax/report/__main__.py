"""Writes the report of a run, or a report that compares several runs side by side.

    imm report runs/tiny
    imm report runs/tiny runs/star --out=runs/compared
    imm report runs/table5 --out=runs/report5 --paper

A folder that holds run directories means all of them. Without --out the report of one run is written to WORKDIR/report.
--paper shows the paper's published figures beside those of runs whose config is that of one of its tables.
"""

import contextlib
from pathlib import Path

from absl import flags

from imm_jax import cli, files, integrity
from imm_jax.errors import UserError
from imm_jax.report import comparison, live, markup, results
from imm_jax.report.sections import paper
from imm_jax.runs import status

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Run directories, DIR,DIR,..., or folders that hold some; also the "
                             "arguments without a name.")
_OUT = flags.DEFINE_string("out", None, "The folder to write; by default, for one run, WORKDIR/report.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier report in --out.")
_PAPER = flags.DEFINE_bool("paper", False, "Show the paper's published figures next to those of the runs.")


def main() -> None:
  """Writes the report and prints where; for one run also prints its table of results."""
  roots = results.find_runs(_WORKDIRS.value)
  if _OUT.value is None and len(roots) > 1:
    raise UserError(f"--workdirs: holds {len(roots)} runs; say with --out=DIR where their report is to be written")
  out = Path(_OUT.value) if _OUT.value else roots[0] / "report"
  if _OUT.value:
    files.check_out(out, {f"workdir {root.name}": root for root in roots}, overwrite=_OVERWRITE.value,
                    explain_foreign=_explain_foreign)
  elif status.is_running(roots[0]):
    raise UserError(f"{roots[0]}: runs, and writes {out} itself; give --out=DIR for another report")
  with files.lock(out):
    if len(roots) == 1:
      run_results = results.Results.read(roots[0])
      with contextlib.nullcontext() if _OUT.value else integrity.rewritten(roots[0], "report"):
        live.write(roots[0], out, extra=paper.make_sections({"": run_results}) if _PAPER.value else ())
      print(results.format_table(run_results))
    else:
      runs = [results.Results.read(root) for root in roots]
      comparison.write(runs, out, extra=paper.make_sections if _PAPER.value else None)
  print(f"report: {out / 'index.html'}")


def _explain_foreign(folder: Path) -> str:
  page = folder / "index.html"
  if not page.is_file() or markup.GENERATOR not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
    return "is no earlier report (it has no index.html of one)"
  unknown = sorted(p.name for p in folder.iterdir() if p.suffix not in (".csv", ".png", ".svg") and p.name not in (
      "index.html", "status.json"))
  return f"is no earlier report (it holds {unknown[0]})" if unknown else ""


if __name__ == "__main__":
  cli.run(main, positional=("workdirs",))
