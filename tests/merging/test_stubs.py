"""merging/__init__.pyi, from which type checkers know the registry's functions, and what they make of it."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from imm_jax import merging
from imm_jax.merging import stubs
from tests import REPO


def test_the_stub_is_up_to_date():
  """`python -m imm_jax.merging.stubs` would write the same."""
  assert stubs.FILE.read_text() == stubs.make_stub(), "write it with python -m imm_jax.merging.stubs"


def test_the_stub_has_all_signatures():
  """It names what the package exports, with the parameters and defaults of each function."""
  tree = ast.parse(stubs.FILE.read_text())
  stated = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
  exported, = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
  assert sorted(exported) == sorted(merging.__all__)
  assert stated.keys() == {name for name in merging.__all__ if name in merging.registry.METHODS}
  for name, node in stated.items():
    parameters = inspect.signature(getattr(merging, name)).parameters.values()
    empty, named = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    assert [a.arg for a in node.args.args] == [p.name for p in parameters if p.kind is not named]
    assert not node.args.defaults
    assert {a.arg: empty if default is None else ast.literal_eval(default)
            for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)} == {
                p.name: p.default for p in parameters if p.kind is named}


@pytest.mark.full
def test_mypy_sees_the_signatures(tmp_path: Path):
  """It takes settings of every form, and names an argument that is missing, unknown or of another type."""
  pytest.importorskip("mypy")
  path = tmp_path / "use.py"
  path.write_text("""\
import jax
import numpy as np
from imm_jax import merging

tree = {"w": np.zeros(2)}
key = jax.random.key(0)
merging.imm(tree, tree, tree, base_weight=0.4, drop_rate=[0.1, 0.2], key=key)
merging.ties(tree, [tree, tree], weights=jax.numpy.ones(2), densities=[0.5, [0.5, 0.2]], scope="model")
merging.slerp(tree, tree, t={"mlp": [0.1, 0.9], "": np.float32(0.5)})
merging.iimm(tree, tree, tree, importance=np.ones(3), base_weight=0.4, drop_rate=0.2, key=key)
merging.imm(tree, tree, tree, base_weight=0.4, drop_rate=0.2)
merging.ties(tree, [tree], densities=0.5, scope="layer")
merging.slerp(tree, tree, t=0.5, tt=0.5)
merging.slurp(tree, tree, t=0.5)
""")
  found = subprocess.run([sys.executable, "-m", "mypy", "--config-file", str(REPO / "pyproject.toml"), str(path)],
                         cwd=REPO, capture_output=True, text=True, check=False)
  errors = [line.partition("use.py:")[2] for line in found.stdout.splitlines() if "error:" in line]
  assert [line.partition(":")[0] for line in errors] == ["11", "12", "13", "14"], found.stdout
  for error, words in zip(errors, ('Missing named argument "key"', "Literal", 'Unexpected keyword argument "tt"',
                                   'no attribute "slurp"'), strict=False):
    assert words in error
