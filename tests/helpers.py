"""What tests of several folders do with commands and errors."""

from absl import flags
from absl.testing import flagsaver

from imm_jax import convert


def run_convert(**values: object) -> None:
  """Runs `imm convert` with these flags in this process."""
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**{name: v if isinstance(v, bool) else str(v) for name, v in values.items()}):
    convert.main()


def chain(error: Exception, cause: Exception) -> Exception:
  """Gives an error its cause."""
  error.__cause__ = cause
  return error
