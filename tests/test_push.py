"""A checkpoint of a run on the hub: what is uploaded, what its card says, what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import ml_collections
import pytest
import yaml
from huggingface_hub import errors

from configs import tiny
from imm_jax import files, integrity, publishing
from imm_jax.errors import Exit, ResourceError, UserError, exit_code
from imm_jax.merging import registry
from tests import REPO, TINY, report_runs
from tests.fake_hub import http_error

# The HTTP library that huggingface_hub uses.
_HTTP = sys.modules[errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]


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
    record["stages"][name] |= {"files": files.digest_files(root / name)}
  report_runs.write_record(root, record)
  config = tiny.get_config()
  with config.unlocked():
    config.update({"model": "Qwen/Qwen2.5-0.5B@main", "rounds": 2, "eval": {"num_samples": 2}})
    config.task.update({"name": "gsm8k", "ood": ("groups", "choice")})
    config.sample.temperatures = (0.5, 0.7)
  (root / "config.json").write_text(json.dumps(config.to_dict()))
  return root / "round_1/merged"


def test_card_tells_the_making(hub: Hub, merged: Path, monkeypatch: pytest.MonkeyPatch):
  """A checkpoint comes with a card that says how it was made."""
  (merged / "notes.txt").write_text("mine")
  # Another package that is called configs changes nothing.
  monkeypatch.setitem(sys.modules, "configs.common", SimpleNamespace(get_config=ml_collections.ConfigDict))
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
  assert "the model after round 1 (rounds 0 to 1)" in text
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
  assert "--config.eval.protocol" not in text


def test_existing_card_stays(hub: Hub, merged: Path, capsys: pytest.CaptureFixture):
  """Weights of an earlier model go."""
  hub.create_repo("me/model", private=False, exist_ok=True)
  old = ("model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
         "adapter_config.json", "spiece.model", "additional_chat_templates/tool.jinja", "tf_model.h5")
  kept = {"data.json", "onnx/model.onnx", "training_args.bin", "model.gguf", "eval/config.json", "figure.png"}
  hub.content["me/model"] |= {"README.md": b"mine"} | dict.fromkeys([*old, *kept], b"{}")
  publishing.push(merged, "me/model", revision="v1")
  assert "README.md" not in hub.content["me/model"].keys() - {"README.md"}
  assert "model.safetensors" not in hub.content["me/model"]
  sent = hub.content["me/model@v1"]
  assert sent["README.md"] == b"mine"
  assert sent.keys() == {".gitattributes", "README.md", *kept, *(path.name for path in TINY.iterdir())} - {
      "recipe.json"}
  said = capsys.readouterr().out
  assert "keeping its README.md" in said
  assert f"deleting {', '.join(sorted(old))} of an earlier model" in said
  publishing.push(merged, "me/model", revision="v1", overwrite_card=True)
  assert b"base_model: Qwen" in sent["README.md"]


def test_foreign_checkpoint_is_refused(hub: Hub, merged: Path):
  """What is not whole is refused, too, before anything is sent."""
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


@pytest.mark.parametrize(("error", "said", "code"), [
    (http_error(errors.HfHubHTTPError, "403 Forbidden\nmore", 403), r"refuses \(403 Forbidden\); run `hf auth login`",
     Exit.MISTAKE),
    (http_error(errors.HfHubHTTPError, "400 Bad Request", 400), r"refuses \(400 Bad Request\); see", Exit.MISTAKE),
    (http_error(errors.HfHubHTTPError, "502 Bad Gateway", 502), r"cannot take it now \(502 Bad Gateway\); try again",
     Exit.RESOURCES),
    (ConnectionError("no network"), r"cannot be reached \(no network\); try again", Exit.RESOURCES),
    (TimeoutError("slow"), r"cannot be reached \(slow\); try again", Exit.RESOURCES),
    (_HTTP.ConnectError("no route"), r"cannot be reached \(no route\); try again", Exit.RESOURCES),
    (_HTTP.ReadTimeout("slow"), r"cannot be reached \(slow\); try again", Exit.RESOURCES)])
def test_what_the_hub_says_is_one_line(hub: Hub, merged: Path, error: Exception, said: str, code: Exit):
  hub.raises = error
  with pytest.raises(UserError, match=said) as raised:
    publishing.push(merged, "me/model")
  assert exit_code(raised.value) == code
  assert isinstance(raised.value, ResourceError) == (code == Exit.RESOURCES)


def test_program_faults_are_not_the_hubs(hub: Hub, merged: Path):
  """A fault of the program is not taken for one of the hub."""
  hub.raises = AttributeError("a slip")
  with pytest.raises(AttributeError, match="a slip"):
    publishing.push(merged, "me/model")


def _noted(root: Path) -> dict[str, Any]:
  """The record of a run as starts note it: what its stages have read, and what the last start goes by."""
  record = report_runs.read_record(root)
  stages = record["stages"]
  record |= {"external": {"base": "b"}, "settings": {name: f"of {name}" for name in stages}}
  for t in range(2):
    sft, merged = f"round_{t}/sft", f"round_{t}/merged"
    start = {f"round_{t - 1}/merged": "0" * 64} if t else {"base": "b"}
    stages[sft]["inputs"] = start
    stages[merged]["inputs"] = {"base": "b", sft: "0" * 64}
    stages[f"round_{t}/eval/merged"]["inputs"] = {merged: "0" * 64}
  for name, entry in stages.items():
    entry["inputs"]["settings"] = f"of {name}"
  return record


@pytest.mark.parametrize(("change", "said"), [
    (lambda r: r["settings"].update({"round_1/merged": "x"}), r"what round_1/merged \(other settings\) was made with"),
    (lambda r: r["settings"].update({"round_0/sft": "x"}), r"what round_0/sft \(other settings\) was made with"),
    (lambda r: r["external"].update(base="x"), r"round_1/merged \(another base\), .*, round_0/sft \(another base\)"),
    (lambda r: r["stages"].pop("round_1/sft"), r"round_1/merged \(a round_1/sft that is no longer there\)"),
    (lambda r: r["stages"]["round_1/sft"].update(output="x"), r"round_1/merged \(another round_1/sft\)"),
    (lambda r: r["settings"].update({"round_1/eval/merged": "x"}), r"round_1/eval/merged \(other settings\)"),
    (lambda r: r.pop("settings"), r"round_1/merged \(other settings\)")],
    ids=["merge", "sft", "base", "sft-is-gone", "sft-changed", "eval", "no-settings"])
def test_models_outside_the_config_are_refused(hub: Hub, merged: Path, change: Callable[[dict], object], said: str):
  """They are none of those that the config makes."""
  root = merged.parent.parent
  record = _noted(root)
  report_runs.write_record(root, record)
  publishing.push(merged, "me/model")
  hub.content.clear()
  change(record)
  report_runs.write_record(root, record)
  with pytest.raises(UserError, match=said + ".*repeat the command"):
    publishing.push(merged, "me/model")
  assert not hub.content


def test_a_config_that_was_edited_is_refused(hub: Hub, merged: Path):
  root = merged.parent.parent
  integrity.write_digests(root / integrity.MANIFEST, root, [root / "config.json"])
  publishing.check_recorded(root, "round_1/merged", merged, [])
  (root / "config.json").write_text((root / "config.json").read_text().replace("0.4", "0.9"))
  with pytest.raises(UserError, match=r"config\.json: differs from what the run has written"):
    publishing.push(merged, "me/model")


def test_unevaluated_model_is_named(hub: Hub, merged: Path, capsys: pytest.CaptureFixture):
  """It has no evaluation, and the card says so."""
  publishing.push(merged, "me/first")
  assert "not been evaluated" not in hub.content["me/first"]["README.md"].decode() + capsys.readouterr().err
  record = report_runs.read_record(merged.parent.parent)
  del record["stages"]["round_1/eval/merged"]
  report_runs.write_record(merged.parent.parent, record)
  publishing.push(merged, "me/model")
  assert "round_1/merged: has not been evaluated; its card says so" in capsys.readouterr().err
  assert "**This model has not been evaluated**: the scores" in hub.content["me/model"]["README.md"].decode()


def test_card_names_the_merge(hub: Hub, merged: Path):
  """It is the one that the config sets."""
  publishing.push(merged, "me/first")
  assert "- Method: `imm`, SFT on right samples, DARE" in hub.content["me/first"]["README.md"].decode()
  path = merged.parent.parent / "config.json"
  config = json.loads(path.read_text())
  config["merge"]["method"] = "slerp"
  path.write_text(json.dumps(config))
  publishing.push(merged, "me/model")
  line, = (line for line in hub.content["me/model"]["README.md"].decode().splitlines() if "- Method" in line)
  assert line.startswith(f"- Method: `imm`, merged by `slerp`: {registry.METHODS['slerp'].summary}")
  assert "DARE" not in line


@pytest.mark.full
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
