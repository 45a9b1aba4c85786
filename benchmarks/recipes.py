"""Runs the recipes of mergekit's own tests with mergekit and with imm_jax, and compares the outputs.

    python benchmarks/recipes.py --workdir=/tmp/merge-recipes

Fetches mergekit's source release with pip into the work folder, installs it into a separate environment on top of this
one's packages, and runs its tests (test_basic_merges, test_tokenizer, test_chat_template) with one change: each recipe
is merged by mergekit in float32 and by imm_jax, and the tests check the output of imm_jax. Prints a Markdown table:
whether a recipe ran, and the largest difference in units in the last place of bfloat16.

With --examples=CLONE/examples, of a clone of mergekit's repository, its example recipes are merged too: each model that
they name is replaced by a small random Llama of as many layers as the recipe takes.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", "/tmp/merge-recipes", "Folder for package, environment and outputs.")
_EXAMPLES = flags.DEFINE_string("examples", "", "Folder of recipes whose models are replaced by small random ones.")
_ONLY = flags.DEFINE_string("only", "", "Part of the names of the tests to run.")
MERGEKIT = "mergekit==0.1.5"
REPO = Path(__file__).parent.parent
# common.py replaces that of mergekit's tests, which the release lacks.
TESTS = Path(__file__).with_name("mergekit_tests")


def main(_: list[str]) -> None:
  root = Path(_WORKDIR.value).resolve()
  home = root / "environment"
  if not home.exists():
    venv.create(home, with_pip=True)
    places = [path for path in sys.path if path.endswith("site-packages")]
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "beside.pth").write_text("\n".join([*places, str(REPO)]) + "\n")
    subprocess.run([home / "bin/pip", "install", "--quiet", "--no-deps", MERGEKIT, "immutables"], check=True)
    subprocess.run([home / "bin/pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", root, MERGEKIT],
                   check=True)
  package = next(root.glob("mergekit-*.tar.gz"))
  with tarfile.open(package) as archive:
    archive.extractall(root, filter="data")
  source = root / package.name.removesuffix(".tar.gz")
  shutil.copytree(TESTS, source / "tests", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
  out = root / "results.jsonl"
  out.unlink(missing_ok=True)
  examples = os.path.abspath(_EXAMPLES.value) if _EXAMPLES.value else ""
  environment = {**os.environ, "RECIPES_OUT": str(out), "RECIPES_EXAMPLES": examples, "JAX_PLATFORMS": "cpu",
                 "PYTHONPATH": f"{REPO}:{source}", "CUDA_VISIBLE_DEVICES": ""}
  names = [f"tests/test_{name}.py" for name in ("basic_merges", "tokenizer", "chat_template", "examples")]
  subprocess.run([home / "bin/python", "-m", "pytest", "-q", "--tb=line", "-o", "addopts=", *names, "-k", _ONLY.value],
                 cwd=source, env=environment, check=False)
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  print("\n| recipe | method | here | furthest, bfloat16's last places | mergekit |\n|---|---|---|---|---|")
  for row in rows:
    here = "ran" if row.get("ran") else row.get("error")
    apart = row.get("different", {})
    far = f"names differ, such as {apart['lacking'][0]}" if apart.get("lacking") else apart.get("furthest", "")
    print(f"| {row['test']} | {row['method']} | {here} | {far} | {row.get('theirs', 'ran')} |")
  print(f"\n{sum(bool(row.get('ran')) for row in rows)} of {len(rows)} recipes ran.")


if __name__ == "__main__":
  app.run(main)
