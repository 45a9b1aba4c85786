"""Validates numbers in the JSON files of checkpoints."""

from imm_jax.errors import UserError

# Range of the normal float32 numbers.
_MIN_NORMAL, _MAX = 2.0**-126, 3.4028235e38
_INTEGER_LIMIT = 2**31


def parse_positive(source: str, key: str, value: object) -> float:
  """Returns the number at a key of a file; raises UserError unless it is positive and float32 can represent it.

  >>> parse_positive("config.json", "rms_norm_eps", 1e-6)
  1e-06
  """
  if isinstance(value, bool) or not isinstance(value, int | float) or not _MIN_NORMAL <= value <= _MAX:
    raise UserError(f"{source}: {key}={value!r:.100}; expected a positive number that float32 holds")
  return float(value)


def parse_positive_integer(source: str, key: str, value: object) -> int:
  """Returns the integer at a key of a file; raises UserError unless it lies in [1, 2^31 - 1]."""
  if type(value) is not int or not 0 < value < _INTEGER_LIMIT:
    raise UserError(f"{source}: {key}={value!r:.100}; expected a positive integer below {_INTEGER_LIMIT}")
  return value
