"""A checkpoint of a run on the hub: what is uploaded, what its card says, what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import errors

from configs import tiny
from imm_jax import files, publishing
from imm_jax.errors import UserError
from tests import REPO, TINY, report_runs
from tests.fake_hub import http_error


class Hub:
  """Repositories that can be written, in place of the hub's."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self.content: dict[str, dict[str, bytes]] = {}
    self.private: dict[str, bool] = {}
    self.raises: Exception | None = None
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

  def repo_exists(self, to: str) -> bool:
    if self.raises:
      raise self.raises
    return to in self.private

  def model_info(self, to: str) -> SimpleNamespace:
    return SimpleNamespace(private=self.private[to])

  def create_repo(self, to: str, *, private: bool | None, exist_ok: bool) -> None:
    assert exist_ok
    self.private.setdefault(to, bool(private))
    self.content.setdefault(to, {".gitattributes": b""})

  def create_branch(self, to: str, *, branch: str, exist_ok: bool) -> None:
    assert exist_ok
    self.content.setdefault(f"{to}@{branch}", dict(self.content[to]))

  def list_repo_files(self, to: str, *, revision: str | None) -> list[str]:
    return [*self.content[f"{to}@{revision}" if revision else to]]

  def create_commit(self, to: str, operations: list[Any], *, commit_message: str, revision: str | None,
                    ) -> SimpleNamespace:
    assert "imm_jax" in commit_message
    here = self.content[f"{to}@{revision}" if revision else to]
    for operation in operations:
      if isinstance(operation, huggingface_hub.CommitOperationDelete):
        del here[operation.path_in_repo]
      else:
        with operation.as_file() as f:
          here[operation.path_in_repo] = f.read()
    return SimpleNamespace(commit_url=f"https://hub.example/{to}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
  return Hub(monkeypatch)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
  """The merged model of the second round of a run."""
  root = report_runs.make(tmp_path / "run", model="Qwen/Qwen2.5-0.5B@main")
  record = report_runs.read_record(root)
  for name in ("round_1/merged", "round_1/sft"):
    shutil.copytree(TINY, root / name, dirs_exist_ok=True)
    record["stages"][name] |= {"files": files.digests(root / name)}
  report_runs.write_record(root, record)
  config = tiny.get_config()
  with config.unlocked():
    config.update({"model": "Qwen/Qwen2.5-0.5B@main", "rounds": 2, "eval": {"num_samples": 2}})
    config.task.update({"name": "gsm8k", "ood": ("groups", "choice")})
    config.sample.temperatures = (0.5, 0.7)
  (root / "config.json").write_text(json.dumps(config.to_dict()))
  return root / "round_1/merged"


def test_a_checkpoint_comes_with_a_card_that_says_how_it_was_made(hub: Hub, merged: Path):
  (merged / "notes.txt").write_text("mine")
  assert publishing.push(merged, "me/model", private=True) == "https://hub.example/me/model"
  assert hub.private == {"me/model": True}
  sent = hub.content["me/model"]
  assert sent.keys() == {".gitattributes", "README.md", *(path.name for path in TINY.iterdir())} - {"recipe.json"}
  for name in ("model.safetensors", "tokenizer.json"):
    assert sent[name] == (TINY / name).read_bytes()
  _, head, text = sent["README.md"].decode().split("---\n", 2)
  assert yaml.safe_load(head) == {
      "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "Qwen/Qwen2.5-0.5B",
      "base_model_relation": "merge", "datasets": ["openai/gsm8k"],
      "tags": ["imm_jax", "self-improvement", "imm", "merge"]}
  assert "https://arxiv.org/abs/2503.02103" in text
  assert "the model after round 2 of 2" in text
  scores = report_runs.read_record(merged.parent.parent)["stages"]
  for stage, label in (("base/eval", "base"), ("round_1/eval/sft", "round 1 sft"),
                       ("round_1/eval/merged", "**round 1 merged**")):
    a = scores[stage]["facts"]["scores"]["groups"]["greedy"]
    line, = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
    assert f"{a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}]" in line
  assert "round 0" not in text
  assert " '--config.sample.temperatures=(0.5, 0.7)'" in text
  assert "--config.merge.base_weight=0.4" in text
  assert "--config.seed" not in text


def test_a_card_that_is_there_stays_and_weights_of_an_earlier_model_go(hub: Hub, merged: Path,
                                                                       capsys: pytest.CaptureFixture):
  hub.create_repo("me/model", private=False, exist_ok=True)
  hub.content["me/model"] |= {"README.md": b"mine", "model-00001-of-00002.safetensors": b"", "data.json": b"{}"}
  publishing.push(merged, "me/model", revision="v1")
  assert "README.md" not in hub.content["me/model"].keys() - {"README.md"}
  assert "model.safetensors" not in hub.content["me/model"]
  sent = hub.content["me/model@v1"]
  assert sent["README.md"] == b"mine"
  assert {name for name in sent if "safetensors" in name} == {"model.safetensors"}
  assert sent["data.json"] == b"{}"
  said = capsys.readouterr().out
  assert "has a README.md, which stays" in said
  assert "model-00001-of-00002.safetensors, of an earlier model, goes" in said
  publishing.push(merged, "me/model", revision="v1", overwrite_card=True)
  assert b"base_model: Qwen" in sent["README.md"]


def test_what_is_not_whole_or_not_the_runs_is_refused_before_anything_is_sent(hub: Hub, merged: Path):
  weights = merged / "model.safetensors"
  whole = weights.read_bytes()
  with pytest.raises(UserError, match="lies in no run directory"):
    publishing.push(TINY, "me/model")
  for damage, message in ((whole[:-1] + bytes([whole[-1] ^ 1]), r"model\.safetensors differs from what the run has"),
                          (whole[:1000], "not a whole safetensors file")):
    weights.write_bytes(damage)
    with pytest.raises(UserError, match=message):
      publishing.push(merged, "me/model")
  weights.write_bytes(whole)
  (merged / "generation_config.json").unlink()
  with pytest.raises(UserError, match=r"generation_config\.json differs"):
    publishing.push(merged, "me/model")
  shutil.copy(TINY / "generation_config.json", merged)
  record = report_runs.read_record(merged.parent.parent)
  del record["stages"]["round_1/sft"]
  report_runs.write_record(merged.parent.parent, record)
  with pytest.raises(UserError, match="is no finished stage"):
    publishing.push(merged.with_name("sft"), "me/model")
  assert not hub.content
  hub.create_repo("me/model", private=False, exist_ok=True)
  with pytest.raises(UserError, match="is public already, and --private"):
    publishing.push(merged, "me/model", private=True)


@pytest.mark.parametrize(("error", "said"), [
    (http_error(errors.HfHubHTTPError, "403 Forbidden\nmore", 403), r"the hub refuses \(403 Forbidden\); run `hf auth"),
    (http_error(errors.HfHubHTTPError, "502 Bad Gateway", 502), r"the hub refuses \(502 Bad Gateway\); try again"),
    (ConnectionError("no network"), r"cannot be reached \(no network\); try again")])
def test_what_the_hub_says_is_one_line(hub: Hub, merged: Path, error: Exception, said: str):
  hub.raises = error
  with pytest.raises(UserError, match=said):
    publishing.push(merged, "me/model")


@pytest.mark.parametrize(("arguments", "said"), [
    (["a"], "error: TO is missing; expected: RUN/round_2/merged ORG/NAME"),
    (["a", "b/c", "d"], "error: unexpected argument 'd'"),
    (["a", "--to=b/c", "--folder=d"], "'a' is given without a name, which means --folder, and --folder is given as"),
    (["a", "b/c", "--to=d/e"], "'b/c' is given without a name, which means --to, and --to is given as well; give one"),
    ([str(TINY), "b/c"], "lies in no run directory")])
def test_wrong_arguments_are_one_line(arguments: list[str], said: str):
  done = subprocess.run([sys.executable, "-m", "imm_jax.push", *arguments], cwd=REPO, capture_output=True, text=True,
                        check=False)
  assert done.returncode
  assert said in done.stderr
  assert len(done.stderr.splitlines()) == 1
