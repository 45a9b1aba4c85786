"""README and docs: links lead somewhere, commands name modules, flags, configs and settings that exist, and docstrings
the arguments.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import common
from imm_jax.merging import registry
from tests import REPO

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), REPO / "benchmarks/README.md",
                REPO / "third_party/README.md"])
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_DEFINED = re.compile(r"(?:DEFINE_\w+|mark_flag\w*)\(\s*\"(\w+)\"")
_COMMAND = re.compile(r"(?:^|\s)(?:imm ([a-z]\w*)|\S*python\S* (?:-m )?(imm_jax\S*|(?:benchmarks|examples)/\w+\.py))"
                      r"(\s.*)?$")
_OF_ABSL = {"help", "verbosity", "helpfull"}


def anchors(page: Path) -> set[str]:
  """Those that GitHub gives a page's headings."""
  heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
  return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path) -> Iterator[list[str]]:
  """What stands in a page's code blocks and starts one of our programs, as arguments; the program comes first."""
  text = re.sub(r"\\\n\s+", "", page.read_text())
  for line in re.findall(r"^ {4,}(.*)$", text, re.M):
    for part in line.split("&&"):
      found = _COMMAND.search(part.strip())
      if found:
        name, program, rest = found.groups()
        yield [program or f"imm_jax.{'main' if name == 'run' else name}", *shlex.split(rest or "", comments=True)]


def flags_of(program: str) -> set[str]:
  """The flags that a program's source defines, with those of all programs."""
  path = REPO / (program if program.endswith(".py") else program.replace(".", "/"))
  files = [path.with_suffix(".py")] if path.with_suffix(".py").exists() else path.glob("*.py")
  found = {name for file in [*files, REPO / "imm_jax/cli.py"] for name in _DEFINED.findall(file.read_text())}
  return found | _OF_ABSL | (set(registry.format_option_help()) if program == "imm_jax.merge" else set())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path):
  for link in _LINK.findall(page.read_text()):
    if link.startswith("https://"):
      continue
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_commands_name_what_exists(page: Path):
  defaults = common.get_config()
  for program, *arguments in commands(page):
    if program == "imm_jax.harness":  # the flags of lm_eval
      continue
    known = flags_of(program)
    for argument in arguments:
      name, _, value = argument.removeprefix("--").partition("=")
      if not argument.startswith("--"):
        continue
      key = name.removeprefix("config.")
      if name == "config":
        file = value.partition(":")[0]
        assert (REPO / file).exists() or (REPO / f"configs/{file}.py").exists() or file == "mine.py", argument
      elif key != name:
        setting = defaults
        for part in key.split("."):
          assert key.startswith("merge.options.") or part in setting, argument
          setting = setting.get(part, setting)
      else:
        assert name.removeprefix("no") in known or name in known, f"{program} {argument}"


def test_docstrings_name_the_arguments_that_there_are():
  for path in (REPO / "imm_jax").rglob("*.py"):
    for function in ast.walk(ast.parse(path.read_text())):
      documented = isinstance(function, ast.FunctionDef) and re.search(
          r"\nArgs:\n((?:  .*\n?|\n)+)", ast.get_docstring(function) or "")
      if documented:
        names = re.findall(r"(?m)^  \**(\w+):", documented[1])
        taken = {a.arg for a in ast.iter_child_nodes(function.args) if isinstance(a, ast.arg)} - {"self", "cls"}
        assert set(names) == taken, f"{path.relative_to(REPO)}: {function.name}"


def test_the_index_has_every_page():
  listed = set(_LINK.findall((REPO / "docs/README.md").read_text()))
  assert listed == {page.name for page in (REPO / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_is_short():
  assert len((REPO / "README.md").read_text().splitlines()) <= 130
