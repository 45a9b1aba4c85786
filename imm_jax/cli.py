"""How every command line tool starts: flags, then `main`, and one clear line for a user's mistake."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
from absl import app, flags, logging

from imm_jax import compilation, hardware, signals
from imm_jax.errors import PreemptedError, UserError

_KEPT = flags.DEFINE_string(
    "compilation_cache", "auto", "The folder where compiled programs are kept for later runs, or off; auto: what "
    "JAX_COMPILATION_CACHE_DIR says, else imm_jax in the user's cache folder.")


def run(main: Callable[[], None], *, positional: Sequence[str] = ()) -> None:
  """Parses flags and calls `main`; a UserError or a wrong flag ends in one line on stderr and exit code 1.

  Arguments without a name are the values of the flags `positional`, in their order.
  """

  def parse(argv: list[str]) -> list[str]:
    try:
      # A config file may import its neighbours (`from configs import common`) wherever the command is given.
      given = re.findall(r"(?m)^--?config[=\n]([^:\n]+)", "\n".join(argv))
      sys.path[:0] = [str(Path(file).resolve().parent.parent) for file in given]
      rest = flags.FLAGS(argv)
    except flags.Error as e:
      lines = str(e).strip().splitlines()
      # ml_collections packs the traceback of a config file into the message; its last line says what happened.
      _fail(f"the config file cannot be loaded: {lines[-1]}" if "Traceback" in str(e) else _one_line(e))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      # ml_collections raises these for a config key or value that does not fit.
      _fail(_config_message(e))
    except Exception as e:  # a config file is Python and may raise anything
      _fail(f"the config file cannot be loaded: {_one_line(e)}")
    for name, value in zip(positional, rest[1:], strict=False):
      flags.FLAGS[name].value = value
    rest = [*rest[:1], *rest[1 + len(positional):]]
    if len(rest) > 1:
      _fail(f"unexpected argument {rest[1]!r}; options are given as --name=value (see --help)")
    return rest

  def call(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # INFO is libraries talking to themselves
    try:
      signals.answer()
      compilation.keep(_KEPT.value)
      with hardware.platforms():
        main()
      sys.stdout.flush()
    except UserError as e:
      _fail(str(e))
    except PreemptedError as e:
      print(f"\n{e}", file=sys.stderr)
      sys.exit(143)  # as a process that SIGTERM ended
    except BrokenPipeError:  # the reader, `head` say, has seen enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(1)
    except OSError as e:
      if e.filename is None:
        raise
      _fail(f"{e.filename}: {e.strerror}")
    except KeyboardInterrupt:
      print(f"\ninterrupted; {signals.GOES_ON}", file=sys.stderr)
      sys.exit(130)

  app.run(call, flags_parser=parse)


def config_of(holder: flags.FlagHolder) -> ml_collections.ConfigDict:
  """The config of a `--config` flag; a file that cannot be loaded is a UserError."""
  try:
    holder.value.to_dict()
  except OSError as e:  # ml_collections reports a file that it could not load at first use
    cause = re.search(r"\[Errno \d+\] (.*)", _one_line(e))
    raise UserError(f"--config: {cause[1] if cause else _one_line(e)}") from e
  except AttributeError as e:
    raise UserError("--config: the file's get_config() returns no ConfigDict") from e
  return holder.value


def _config_message(error: Exception) -> str:
  text = _one_line(error).strip('"')
  hint = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text)
  if hint:
    return f"the config has no key {hint[2]!r}; did you mean {hint[1]!r}?"
  return f"the config has no such key or value: {text} (configs/common.py lists all keys)"


def _one_line(error: Exception) -> str:
  return re.sub(r"\s+", " ", str(error).replace("\\n", " ")).strip()


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)
