"""`python -m imm_jax.merge`: what it writes, and what it refuses in one line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from imm_jax import files, merging
from imm_jax.model import hf, hub
from tests import REPO
from tests.merge_folders import models, one_line, read, run, write


def test_the_command_merges_as_the_loop_does(tmp_path: Path):
  """On the embedded model: the weights of `merging.imm` on stacked layers, and everything that transformers reads."""
  base = hub.resolve("tiny")
  _, params = hf.load(base)
  tuned = jax.tree.map(lambda p: (p.astype(np.float32) * 1.01 + 0.001).astype(p.dtype), params)
  hf.save(tuned, tmp_path / "tuned", like=base)
  done = run("--method=imm", f"--base={base}", f"--tuned={tmp_path / 'tuned'}", f"--out={tmp_path / 'out'}", "--seed=3",
             "--base_weight=0.4", "--drop_rate=0.3")
  assert done.returncode == 0, done.stderr
  expected = merging.imm(params, params, tuned, base_weight=0.4, drop_rate=0.3, key=jax.random.key(3),
                         names=hf.tensor_names(params))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
               hf.load(tmp_path / "out")[1], expected)
  for name in ("config.json", "tokenizer.json", "generation_config.json"):
    assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
  record = json.loads((tmp_path / "out/merge.json").read_text())
  assert (record["method"], record["seed"]) == ("imm", 3)
  assert record["options"] == {"base_weight": 0.4, "drop_rate": 0.3}
  digests = {label: model["xxh3_128"] for label, model in record["inputs"].items()}
  assert digests["base"] == digests["start"] != digests["tuned"]
  assert "imm" in (tmp_path / "out/README.md").read_text()


@pytest.mark.full
def test_a_sweep_writes_what_single_merges_write(folders: list[Path], tmp_path: Path):
  flags = ["--method=imm", f"--base={folders[0]}", f"--start={folders[1]}", f"--tuned={folders[2]}", "--drop_rate=0.3"]
  assert run(*flags, f"--out={tmp_path / 'sweep'}", "--sweep_base_weight=0.1,0.5").returncode == 0
  for weight in ("0.1", "0.5"):
    out = tmp_path / weight
    assert run(*flags, f"--out={out}", f"--base_weight={weight}").returncode == 0
    swept = tmp_path / "sweep" / f"base_weight_{weight}"
    assert (swept / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert json.loads((swept / "merge.json").read_text())["options"]["base_weight"] == float(weight)


def test_out_dtype_is_written_and_named(folders: list[Path], tmp_path: Path):
  """It stands in config.json, too."""
  done = run("--method=linear", f"--models={folders[0]},{folders[3]}", "--weights=1", "--out_dtype=bfloat16",
             f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  expected = merging.linear([models()[0], models()[3]], weights=1)
  for name, x in read(tmp_path / "out").items():
    if name == "ids":
      assert x.tolist() == [0, 1, 2, 3, 4]
    else:
      np.testing.assert_array_equal(x, np.asarray(expected[name]).astype(ml_dtypes.bfloat16))
  assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.full
@pytest.mark.parametrize(("flags", "expected"), [
    (("--method=imm", "--base=BASE"), "--tuned is missing"),
    (("--method=tise", "--base=BASE"), "ties"),
    (("--method=ties", "--models=BASE", "--weights=1", "--densities=0.5"), "--base is missing"),
    (("--method=ties", "--base=BASE", "--models=BASE", "--weights=1"), "--densities is missing"),
    (("--method=linear", "--models=BASE", "--weights=1", "--t=1"), "--t: linear does not take it, but --weights"),
    (("--method=imm", "--base=BASE", "--tuned=BASE", "--drop_rate=1"), "drop_rate=1.0 at 'model.embed_tok"),
    (("--method=imm", "--base=BASE", "--tuned=BASE", "--base_weight=[x"), "is not YAML"),
    (("--method=imm", "--base=BASE", "--tuned=/no/such"), "/no/such: no such checkpoint folder"),
    (("--method=imm", "--base=BASE", "--tuned=BASE", "--sweep_base_weight=0.1,2"), "expected numbers from 0 to 1"),
    (("--method=imm", "--base=BASE", "--tuned=BASE", "--sweep_base_weight=0.1 # /../x"), "expected numbers from 0"),
    (("--recipe=RECIPE", "--fishers=BASE"), "--fishers: cannot be combined with --recipe"),
    (("--recipe=RECIPE", "--sweep_base_weight=0.1"), "--sweep_base_weight: is for a recipe of one document"),
    (("--method=imm", "--base=BASE", "--tuned=BASE", "--max_shard_size=big"), "--max_shard_size=big"),
    (("--recipe=/no/such.yml",), "/no/such.yml: cannot be read")])
def test_bad_flags_are_one_line(flags: tuple[str, ...], expected: str, folders: list[Path], tmp_path: Path):
  recipe = tmp_path / "recipe.yml"
  recipe.write_text("name: a\n---\nname: b\n")
  done = run(*(f.replace("BASE", str(folders[0])).replace("RECIPE", str(recipe)) for f in flags),
             f"--out={tmp_path / 'out'}")
  assert expected in one_line(done)
  assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.full
def test_an_output_that_exists_is_kept_unless_asked(folders: list[Path], tmp_path: Path):
  flags = ("--method=linear", f"--models={folders[0]},{folders[1]}", "--weights=1")
  (tmp_path / "out").mkdir()
  (tmp_path / "out/mine.txt").write_text("mine")
  assert "exists; give another folder, or --overwrite" in one_line(run(*flags, f"--out={tmp_path / 'out'}"))
  assert (tmp_path / "out/mine.txt").read_text() == "mine"
  assert "is no earlier merge" in one_line(run(*flags, f"--out={tmp_path / 'out'}", "--overwrite"))
  assert (tmp_path / "out/mine.txt").read_text() == "mine"
  (tmp_path / "out/mine.txt").unlink()
  for _ in range(2):
    assert run(*flags, f"--out={tmp_path / 'out'}", "--overwrite").returncode == 0
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
  assert "holds the input" in one_line(run(*flags, f"--out={folders[0]}", "--overwrite"))
  assert "lies in the input" in one_line(run(*flags, f"--out={folders[0] / 'merged'}"))
  (tmp_path / "link").symlink_to(tmp_path / "out")
  assert "is a link or a file" in one_line(run(*flags, f"--out={tmp_path / 'link'}", "--overwrite"))
  with files.lock(tmp_path / "other"):
    assert "another process writes it" in one_line(run(*flags, f"--out={tmp_path / 'other'}"))


def test_a_full_disk_is_one_line_and_leaves_nothing(folders: list[Path], tmp_path: Path):
  big = {"w": np.zeros((600, 1000), np.float32)}
  a, b = write(tmp_path / "a", big), write(tmp_path / "b", big)
  # A limit on the size of files stands in for a full disk: the kernel refuses the write in the same place.
  done = subprocess.run(
      ["bash", "-c", 'ulimit -f 1024; trap "" XFSZ; exec "$@"', "bash", sys.executable, "-m", "imm_jax.merge",
       "--method=linear", f"--models={a},{b}", "--weights=1", f"--out={tmp_path / 'out'}"],
      cwd=REPO, capture_output=True, text=True, check=False)
  assert "cannot be written (File too large)" in one_line(done, 69)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_disk_too_small_is_refused_before_the_work(folders: list[Path], tmp_path: Path):
  mount = tmp_path / "disk"
  mount.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount]
  if subprocess.run(command, capture_output=True, check=False).returncode:
    pytest.skip("needs the right to mount")
  try:
    big = {"w": np.zeros((600, 1000), np.float32)}
    a, b = write(tmp_path / "a", big), write(tmp_path / "b", big)
    flags = ("--method=linear", f"--models={a},{b}", "--weights=1", f"--out={mount / 'out'}")
    assert "needs 2.3 MiB, the disk has 1.0 MiB free" in one_line(run(*flags), 69)
    assert list(mount.iterdir()) == []
  finally:
    subprocess.run(["umount", mount], check=True)


def test_killed_merge_leaves_no_output(tmp_path: Path):
  """The next one is whole."""
  rng = np.random.default_rng(0)
  folders = [write(tmp_path / str(i), {f"w{j}": rng.normal(size=(500, 1000)).astype(np.float32) for j in range(20)})
             for i in range(2)]
  before = [(f / "model.safetensors").read_bytes() for f in folders]
  flags = ("--method=dare_linear", f"--base={folders[0]}", f"--models={folders[1]}", "--weights=1", "--densities=0.5",
           f"--out={tmp_path / 'out'}")
  process = subprocess.Popen([sys.executable, "-m", "imm_jax.merge", *flags], cwd=REPO, stderr=subprocess.DEVNULL)
  part = tmp_path / ".out.part"
  while process.poll() is None and not (part / "model.safetensors").exists():
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (tmp_path / "out").exists()
  assert run(*flags).returncode == 0
  assert not part.exists()
  assert [(f / "model.safetensors").read_bytes() for f in folders] == before
  key = jax.random.key(0)
  expected = merging.dare_linear(read(folders[0]), [read(folders[1])], weights=1, densities=0.5, key=key)
  for name, x in read(tmp_path / "out").items():
    np.testing.assert_array_equal(x, expected[name])
