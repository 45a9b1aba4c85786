"""Parses the arguments of config files: `configs/qwen.py:1.5b,task=math`."""

from collections.abc import Sequence


def parse(argument: str | None, **choices: Sequence[str]) -> dict[str, str]:
  """Returns the value of each argument; by default the first of its choices.

  A value without a name belongs to the argument that has it among its choices.

  Args:
    argument: text after the colon: values, or NAME=VALUE, separated by commas.
    **choices: the allowed values of each argument.

  Raises:
    ValueError: for an unknown argument or value, and a value that fits several arguments.

  >>> parse("1.5b,task=math", size=("0.5b", "1.5b"), task=("gsm8k", "math"))
  {'size': '1.5b', 'task': 'math'}
  """
  values = {name: allowed[0] for name, allowed in choices.items()}
  for part in filter(None, (argument or "").split(",")):
    name, equals, value = part.partition("=")
    if not equals:
      matches = [n for n, allowed in choices.items() if part in allowed]
      if len(matches) > 1:
        raise ValueError(f"{part!r} may be {' or '.join(f'{n}={part}' for n in matches)}: say which")
      name, value = matches[0] if matches else "", part
    if value not in choices.get(name, ()):
      known = "; ".join(f"{n}={'|'.join(filter(None, allowed))}" for n, allowed in choices.items())
      raise ValueError(f"the config has no argument {part!r}; known are {known}")
    values[name] = value
  return values
