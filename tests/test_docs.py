"""README and docs: links lead somewhere; commands, paths, imports and dotted names name what exists, those for own data
work on rows as shown, and docstrings name the arguments; names of tests are short.
"""

import ast
import io
import pkgutil
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import imm_jax
from configs import common
from imm_jax import config_checks, config_files
from imm_jax.merging import registry
from imm_jax.stages import merge_settings
from tests import REPO
from tests.conftest import LONG

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), REPO / "benchmarks/README.md",
                REPO / "third_party/README.md"])
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_DEFINED = re.compile(r"(?:DEFINE_\w+|mark_flag\w*)\(\s*\"(\w+)\"")
_COMMAND = re.compile(r"(?:^|\s)(?:imm ([a-z]\w*)|\S*python\S* (?:-m )?(imm_jax\S*|(?:benchmarks|examples)/\w+\.py))"
                      r"(\s.*)?$")
_PATH = re.compile(r"(?<![\w/.~-])(?:imm_jax|docs|tests|benchmarks|configs|examples)/[\w/.-]*\w/?")
_IMPORT = re.compile(r"^ *from (imm_jax[\w.]*) import (.+)$", re.M)
_DOTTED = re.compile(r"(?<![\w/.-])imm_jax(?:\.\w+)+")
_OF_MODULE = re.compile(r"`(\w+)\.(\w+)(?:\(\))?`")
_PLACEHOLDER = re.compile(r"\b[A-Z]+\b(?!\.md)")  # as NAME in configs/NAME.py
_OF_ABSL = {"help", "verbosity", "helpfull"}


def anchors(page: Path) -> set[str]:
  """Those that GitHub gives a page's headings."""
  heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
  return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path) -> Iterator[list[str]]:
  """What stands in a page's code, in lines or within a text, and starts one of our programs, as arguments; the program
  comes first.
  """
  text = re.sub(r"\\\n\s+", "", page.read_text())
  fenced = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
  for line in [*re.findall(r"^ {4,}(.*)$", text, re.M), *fenced, *re.findall(r"`(imm [^`]+)`", text)]:
    for part in line.split("&&"):
      found = _COMMAND.search(part.strip())
      if found:
        name, program, rest = found.groups()
        yield [program or f"imm_jax.{'main' if name == 'run' else name}", *shlex.split(rest or "", comments=True)]


def read_prose(path: Path) -> str:
  """Returns what people read in a file: a page whole, of a source the docstrings and comments."""
  text = path.read_text()
  if path.suffix == ".md":
    return text
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
  docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  return "\n".join([*docstrings, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


def names_something(name: str) -> bool:
  """Returns whether a dotted name is a module, or what stands in one."""
  module = REPO / name.replace(".", "/")
  if module.is_dir() or module.with_suffix(".py").exists():
    return True
  try:
    pkgutil.resolve_name(name)
  except (ImportError, AttributeError):
    return False
  return True


def bound_names(path: Path) -> set[str]:
  """Returns all names that a source binds, also within its classes and functions."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      found.add(node.name)
    elif isinstance(node, ast.Name):
      found.add(node.id)
    elif isinstance(node, ast.alias):
      found.add(node.asname or node.name.partition(".")[0])
  return found


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
  defaults, text = common.get_config().to_dict(), page.read_text()
  # The options of all methods, and of the method that a page shows how to write.
  defaults["merge"]["options"] = {*registry.format_option_help(), *re.findall(r'Option\("(\w+)"', text)}
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
          assert part in setting, argument
          setting = setting[part] if isinstance(setting, dict) else {}
      else:
        assert name.removeprefix("no") in known or name in known, f"{program} {argument}"


@pytest.mark.full
def test_commands_for_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """The commands of docs/data.md pass the checks of a run on rows like those that the page shows."""
  page = REPO / "docs/data.md"
  row, choice = re.findall(r"^ {4}(\{\"question\".*\})$", page.read_text(), re.M)
  (tmp_path / "choices.jsonl").write_text(f"{choice}\n")
  (tmp_path / "DIR").mkdir()
  for file, names in {"mine": ("Ann", "Bea"), "DIR/test": ("Cyd", "Dan"), "DIR/train": ("Eve", "Fay")}.items():
    (tmp_path / f"{file}.jsonl").write_text("".join(f"{row.replace('Ann', name)}\n" for name in names))
  monkeypatch.chdir(tmp_path)
  folders = []
  for program, *arguments in commands(page):
    given = dict(argument.partition("=")[::2] for argument in arguments)
    settings = [argument for argument in arguments if argument.startswith("--config.")]
    monkeypatch.setattr(sys, "argv", [program, *settings])  # config_flags defines a flag for each setting that it has
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config_files.load(given["--config"]), flag_values=values)
    values(sys.argv)
    assert not values.config.task.ood  # which may be downloads
    config_checks.validate(values.config, trains=program == "imm_jax.main", downloads=False)
    folders.append(given.get("--out") or given["--workdir"])
  assert len(set(folders)) == len(folders) == 4


def test_methods_without_a_base_weight():
  listed = re.search(r"`lines` also .*?;(.*?)have no such weight", (REPO / "docs/methods.md").read_text(), re.S)[1]
  assert set(re.findall(r"`(\w+)`", listed)) == {
      name for name in registry.list_round_methods() if not merge_settings.has_strength(name)}, (
          "docs/methods.md lists the methods that declare no strength")


def test_docstrings_name_real_arguments():
  """They name the arguments that there are, and all of them."""
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


def test_names_of_tests_are_short():
  """What a name leaves out stands in the docstring."""
  for path in (REPO / "tests").rglob("test_*.py"):
    for name in re.findall(r"(?m)^ *def (test_\w+)", path.read_text()):
      assert len(name) <= 48, f"{path.relative_to(REPO)}: {name}"


def test_paths_exist():
  """Those in pages, docstrings and comments."""
  sources = [path for folder in ("imm_jax", "tests", "benchmarks", "configs", "examples")
             for path in sorted((REPO / folder).rglob("*.py"))]
  assert not [f"{path.relative_to(REPO)}: {name}" for path in [*PAGES, *sources]
              for name in _PATH.findall(read_prose(path))
              if not (REPO / name).exists() and not _PLACEHOLDER.search(name)]


def test_imports_in_pages_work():
  """Those in code blocks."""
  found = [f"{module}.{name.split()[0]}" for page in PAGES for module, names in _IMPORT.findall(page.read_text())
           for name in names.partition("#")[0].strip("() ").split(",")]
  assert len(found) > 5
  assert not [name for name in found if not names_something(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_dotted_names_in_pages_exist(page: Path):
  names = _DOTTED.findall(page.read_text())
  assert not [name for name in names if not names_something(name) and not _PLACEHOLDER.search(name)]


def test_names_of_modules_exist():
  """Those like `module.name`, where a module of the package has that name and no section of the config has."""
  modules: dict[str, set[str]] = {}
  for path in (REPO / "imm_jax").rglob("*.py"):
    name = path.parent.name if path.stem == "__init__" else path.stem
    modules.setdefault(name, set()).update(bound_names(path))
    modules.setdefault(path.parent.name, set()).add(path.stem)
  others = {"config", "imm_jax", *common.get_config().keys()}
  suffixes = {"md", "py", "js", "json", "jsonl", "csv", "png", "svg", "html", "log"}
  assert not [f"{path.relative_to(REPO)}: {module}.{name}" for path in [*PAGES, *(REPO / "imm_jax").rglob("*.py")]
              for module, name in _OF_MODULE.findall(read_prose(path))
              if module in modules.keys() - others and name not in modules[module] | suffixes]


def test_public_names_need_one_import():
  """What docs/python_api.md names below `imm_jax` is there after `import imm_jax` alone."""
  names = {name.partition(".")[2] for name in _DOTTED.findall((REPO / "docs/python_api.md").read_text())}
  # The longest first: others import more than they need.
  public = sorted((n for n in names if n.partition(".")[0] in imm_jax.__all__), key=lambda n: (-n.count("."), n))
  assert len(public) > 5
  code = "import operator, sys, imm_jax\nfor name in sys.argv[1:]: operator.attrgetter(name)(imm_jax)"
  done = subprocess.run([sys.executable, "-c", code, *public], cwd=REPO, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_files_that_go_first_exist():
  """A list in conftest.py has them, which take longest."""
  assert not [name for name in LONG if not (REPO / "tests" / name).exists()]
