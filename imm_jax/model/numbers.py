"""Numbers of checkpoints' JSON files, which may be anything."""

from imm_jax.errors import UserError

# Of the normal numbers of float32.
_LEAST, _MOST = 2.0**-126, 3.4028235e38
_MOST_WHOLE = 2**31


def positive(source: str, key: str, value: object) -> float:
  """The number at a key of a file; raises UserError for what is none that is positive and that float32 holds.

  >>> positive("config.json", "rms_norm_eps", 1e-6)
  1e-06
  """
  if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST <= value <= _MOST:
    raise UserError(f"{source}: {key}={value!r:.100}; expected a positive number that float32 holds")
  return float(value)


def positive_integer(source: str, key: str, value: object) -> int:
  """The integer at a key of a file; raises UserError for what is none from 1 to 2^31 - 1."""
  if type(value) is not int or not 0 < value < _MOST_WHOLE:
    raise UserError(f"{source}: {key}={value!r:.100}; expected a positive integer below {_MOST_WHOLE}")
  return value
