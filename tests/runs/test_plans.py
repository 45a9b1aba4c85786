"""The paper's plans from end to end, with the embedded model and few questions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from configs import paper
from imm_jax import experiments
from imm_jax.errors import UserError


def test_other_files_are_refused_early(tmp_path: Path):
  """They are refused before the runs."""
  config = paper.get_config("figure=3,scale=tiny")
  (tmp_path / "prose.docx").touch()
  config.analyses.importance_bookcorpus.task = f"text=file:{tmp_path / 'prose.docx'}"
  with pytest.raises(UserError, match=r"analysis importance_bookcorpus: .*prose\.docx: expected a name that ends in"):
    experiments.validate(config)


@pytest.mark.slow
def test_all_plans_run_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture):
  config = paper.get_config("all,scale=tiny")
  for run in config.runs.values():
    run.update_from_flattened_dict({"task.questions_per_round": 60, "task.eval_questions": 10, "sft.epochs": 1,
                                    "sample.num_samples": 2, "analysis.examples": 8, "analysis.drift": 4})
  for analysis in config.analyses.values():
    if "config" in analysis:
      analysis.config.analysis.examples = 8
  experiments.validate(config)
  experiments.run(config, str(tmp_path))
  for name, run in config.runs.items():
    stages = json.loads((tmp_path / name / "run.json").read_text())["stages"]
    last = "merged" if f"round_{run.rounds - 1}/merged" in stages else "sft"
    assert f"round_{run.rounds - 1}/eval/{last}" in stages, name
    assert (tmp_path / name / "report/index.html").exists(), name
  for name, analysis in config.analyses.items():
    found = json.loads((tmp_path / "analyses" / name / "analysis.json").read_text())
    measure, = found[analysis.kind].values()
    assert len(measure["layers"]) == 4, name
    assert np.isfinite(measure["layers"]).all(), name
  assert list((tmp_path / "analyses/figures").glob("*.png"))
  capsys.readouterr()
  experiments.run(config, str(tmp_path))  # all of it is done
  said = capsys.readouterr().out
  assert len(re.findall(r"^0 of \d+ stages were run", said, re.M)) == len(config.runs)
  assert said.count("done before") >= len(config.analyses)
