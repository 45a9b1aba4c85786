"""Checks what stands in a recipe file: its errors and notes name the file, the place and what would be right."""

import difflib
from collections.abc import Mapping
from typing import Any, NoReturn

import yaml

from imm_jax.errors import UserError, print_once, suggest

# As mergekit reads them.
_FLAGS = {"true": True, "yes": True, "on": True, "t": True, "y": True, "1": True, "1.0": True,
          "false": False, "no": False, "off": False, "f": False, "n": False, "0": False, "0.0": False}


class _Duplicate(yaml.MarkedYAMLError):
  """Reports a key that stands twice in a mapping, of which YAML's own loaders silently take the last."""


class YamlLoader(yaml.SafeLoader):
  """Loads YAML and refuses duplicate keys; what a merge key (<<) brings may be given again."""

  def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
    node, seen = super().compose_mapping_node(anchor), set()
    for key, _ in node.value:
      if isinstance(key, yaml.ScalarNode):
        if (key.tag, key.value) in seen:
          raise _Duplicate(problem=f"{key.value!r} is duplicated in one mapping", problem_mark=key.start_mark)
        seen.add((key.tag, key.value))
    return node


def describe_yaml_error(error: yaml.YAMLError) -> str:
  """Describes what is wrong with a text of YAML in one line."""
  if isinstance(error, _Duplicate):
    return f"{error.problem} (line {error.problem_mark.line + 1}); keep one of them"
  return f"is not YAML ({' '.join(str(error).split())})"


class RecipeFile:
  """Reads a recipe file; its methods fail with a UserError that begins with its path."""

  def __init__(self, place: str, keys: set[str]):
    """Takes what messages begin with, such as the path, and all keys that have a meaning anywhere in a recipe."""
    self._place, self._keys = place, keys

  def fail(self, problem: str) -> NoReturn:
    """Raises the UserError."""
    raise UserError(f"{self._place}: {problem}")

  def note(self, text: str) -> None:
    """Prints a note on stderr, once."""
    print_once(f"note: {self._place}: {text}")

  def read_mapping(self, where: str, value: Any, expected: str) -> dict[str, Any]:
    """Returns a value that must be a mapping with texts as keys."""
    if not isinstance(value, dict):
      self.fail(f"{where}: expected {expected}")
    return value

  def check_known(self, where: str, raw: Mapping[str, Any], known: set[str], ignored: set[str] | None = None,
                     ) -> None:
    """Fails if a mapping has another key than those known and ignored; `where` ends with a dot unless it is empty."""
    for key in raw:
      if key not in known and key not in (ignored or set()):
        self._fail_unknown(where, key, known | (ignored or set()))

  def note_unknown(self, where: str, raw: Mapping[str, Any], known: set[str], ignored: set[str]) -> None:
    """Fails for a key that has a meaning elsewhere or resembles one that has; for others a note says they have none.

    mergekit ignores all keys that it does not know, so that people keep YAML anchors and remarks under keys of their
    own.
    """
    for key in raw:
      if key in known or key in ignored:
        continue
      if difflib.get_close_matches(str(key), sorted(self._keys), n=1, cutoff=0.75):
        self._fail_unknown(where, key, known | ignored)
      self.note(f"{where}{key} is not known and has no effect")

  def _fail_unknown(self, where: str, key: Any, expected: set[str]) -> NoReturn:
    hint = suggest(str(key), sorted(expected)) if expected else "expected none here"
    self.fail(f"{where}{key} is not supported{' here' if key in self._keys else ''}; {hint}")

  def read_flag(self, where: str, value: Any) -> bool:
    """Returns a flag, written as YAML's true and false, 1 and 0, or a text such as `no`."""
    flag = _FLAGS.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
    if flag is None:
      self.fail(f"{where}={value!r}: expected true or false")
    return flag

  def read_integer(self, where: str, value: Any, expected: str) -> int:
    """Returns a value that must be a whole number >= 0; 3.0 is one, true is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 0:
      self.fail(f"{where}={value!r}: expected {expected}")
    return int(value)
