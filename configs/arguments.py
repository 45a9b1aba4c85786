"""Arguments of config files: `configs/qwen.py:1.5b,task=math`."""

from collections.abc import Sequence


def parse(argument: str | None, **choices: Sequence[str]) -> dict[str, str]:
  """The value of each argument, of the allowed ones; the first stands for what is not given.

  A value without a name is looked up among all choices.

  Raises:
    ValueError: for an argument or a value that is not known.

  >>> parse("1.5b,task=math", size=("0.5b", "1.5b"), task=("gsm8k", "math"))
  {'size': '1.5b', 'task': 'math'}
  """
  values = {name: allowed[0] for name, allowed in choices.items()}
  for part in filter(None, (argument or "").split(",")):
    name, given, value = part.partition("=")
    if not given:
      fitting = [n for n, allowed in choices.items() if part in allowed]
      if len(fitting) > 1:
        raise ValueError(f"{part!r} may be {' or '.join(f'{n}={part}' for n in fitting)}: say which")
      name, value = fitting[0] if fitting else "", part
    if value not in choices.get(name, ()):
      known = "; ".join(f"{n}={'|'.join(filter(None, allowed))}" for n, allowed in choices.items())
      raise ValueError(f"the config has no argument {part!r}; known are {known}")
    values[name] = value
  return values
