"""How every command line tool starts: flags, then `main`, and one clear line for a user's mistake."""

import difflib
import re
import sys
from collections.abc import Callable

from absl import app, flags

from imm_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
  """Parses flags and calls `main`; a UserError or a wrong flag ends in one line on stderr and exit code 1."""

  def parse(argv: list[str]) -> list[str]:
    try:
      rest = flags.FLAGS(argv)
    except flags.Error as e:
      _fail(str(e))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      # ml_collections raises these for a config key or value that does not fit.
      _fail(_config_message(e))
    except (OSError, ImportError, SyntaxError) as e:
      _fail(f"the config file cannot be loaded: {e}")
    if len(rest) > 1:
      _fail(f"unexpected argument {rest[1]!r}; options are given as --name=value (see --help)")
    return rest

  def call(_: list[str]) -> None:
    try:
      main()
    except UserError as e:
      _fail(str(e))
    except KeyboardInterrupt:
      print("\ninterrupted; the same command goes on from the last finished stage", file=sys.stderr)
      sys.exit(130)

  app.run(call, flags_parser=parse)


def nearest(name: str, known: list[str]) -> str:
  """A hint for a mistyped name.

  >>> nearest("base_wieght", ["base_weight", "drop_rate"])
  'did you mean base_weight?'
  """
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f"did you mean {close[0]}?" if close else f"expected one of: {', '.join(known)}"


def _config_message(error: Exception) -> str:
  text = str(error.args[0]) if error.args else str(error)
  return re.sub(r"\s+", " ", text).strip()


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)
