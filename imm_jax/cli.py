"""How every command line tool starts: flags, then `main`, and one clear line for a user's mistake."""

import contextlib
import itertools
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import ml_collections
from absl import app, flags, logging

from imm_jax import config_files
from imm_jax.errors import Exit, PreemptedError, UserError, exit_code, suggest
from imm_jax.runtime import compilation, signals

# Of what another's error says.
_LONGEST = 300
# Values of a flag that are listed beside it.
_MOST = 10
# What absl adds to the flags of the module that runs.
_OF_ABSL = ("help", "helpfull", "helpshort", "helpxml", "only_check_args")

_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", "auto", "The folder where compiled programs are kept for later runs, or off; auto: what "
    "JAX_COMPILATION_CACHE_DIR says, else imm_jax in the user's cache folder.")


def run(main: Callable[[], None], *, positional: Sequence[str] = ()) -> None:
  """Parses flags and calls `main`; what ends it early is said in one line on stderr and by the exit code (`Exit`).

  Arguments without a name are the values of the flags `positional`, in their order; where the last of these holds a
  list, it takes all that are left.
  """

  def parse(argv: list[str]) -> list[str]:
    if {"--help", "-help", "-h"}.intersection(itertools.takewhile(lambda arg: arg != "--", argv[1:])):
      with contextlib.suppress(BrokenPipeError):
        print(_help(argv[0]), flush=True)
      os._exit(Exit.DONE)  # past Python's own end, which would speak of a pipe that nobody reads
    try:
      argv, file = _with_config_file(argv)
      with config_files.importable(file):
        rest = flags.FLAGS(argv)
    except flags.Error as e:
      lines = str(e).strip().splitlines()
      # ml_collections packs the traceback of a config file into the message; its last line says what happened.
      _fail(f"the config file cannot be loaded: {lines[-1]}" if "Traceback" in str(e) else _one_line(e))
    except UserError as e:
      _fail(str(e))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      # ml_collections raises these for a config key or value that does not fit.
      _fail(_config_message(e, argv))
    except Exception as e:  # a config file is Python and may raise anything
      _fail(f"the config file cannot be loaded: {_one_line(e)}")
    rest = [*rest[:1], *_place(positional, rest[1:])]
    if len(rest) > 1:
      _fail(f"unexpected argument {rest[1]!r}; options are given as --name=value (see --help)")
    return rest

  def call(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # INFO is libraries talking to themselves
    try:
      signals.install_handlers()
      compilation.enable_cache(_COMPILATION_CACHE.value)
      main()
      sys.stdout.flush()
    except PreemptedError as e:
      print(f"\n{e}", file=sys.stderr)
      sys.exit(exit_code(e))
    except BrokenPipeError:  # the reader, `head` say, has seen enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(1)
    except KeyboardInterrupt as e:
      print(f"\ninterrupted; {signals.RESUME_HINT}", file=sys.stderr)
      sys.exit(exit_code(e))
    except Exception as e:
      _end(e)

  app.run(call, flags_parser=parse)


def _place(positional: Sequence[str], given: list[str]) -> list[str]:
  """Sets these flags to the arguments without a name; returns those that are left."""
  for name in positional:
    flag = flags.FLAGS[name]
    takes = given if name == positional[-1] and isinstance(flag.parser, flags.ListParser) else given[:1]
    if takes and flag.present:
      _fail(f"{takes[0]!r} is given without a name, which means --{name}, and --{name} is given as well; give one of "
            "them")
    if takes:
      flag.value = takes if takes is given else takes[0]
    given = given[len(takes):]
  return given


def _end(error: Exception) -> NoReturn:
  """Ends with an error's line and code; only a defect of the program is shown with its traceback."""
  if isinstance(error, AssertionError | RuntimeError) and "jax" in sys.modules:
    from imm_jax.runtime import hardware  # late: some commands do without jax
    try:
      with hardware.explain_missing_platform():
        raise error
    except Exception as explained:
      error = explained
  code, why = exit_code(error), _one_line(error)[:_LONGEST]
  if isinstance(error, UserError):
    _fail(str(error), code)
  if isinstance(error, OSError) and error.filename is not None:
    _fail(f"{error.filename}: {error.strerror}", code)
  if code == Exit.BUG:
    traceback.print_exception(error)
    print("error: this is a fault of imm_jax, or of what it uses (the lines above)", file=sys.stderr)
    sys.exit(code)
  logging.info("what was wanting:", exc_info=error)  # --verbosity=0 shows where
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in why or "memory" in why.lower():
    _fail(f"the memory does not suffice ({why or type(error).__name__}); smaller batches take less (sample.batch_size, "
          "eval.batch_size, more of sft.accumulation), and --dry_run says how much a run will take", code)
  _fail(why or type(error).__name__, code)


def _with_config_file(argv: list[str]) -> tuple[list[str], Path | None]:
  """The arguments with the config's path in place of its name, and that file."""
  argv, file = list(argv), None
  if "config" not in flags.FLAGS:
    return argv, file
  for i, arg in enumerate(argv):
    given = re.fullmatch(r"(--?config=)(.+)", arg, re.DOTALL)
    if not given and (arg not in ("--config", "-config") or i + 1 == len(argv)):
      continue
    place, before, value = (i, given[1], given[2]) if given else (i + 1, "", argv[i + 1])
    path, colon, argument = value.partition(":")
    file = config_files.find(path)
    argv[place] = f"{before}{file}{colon}{argument}"
  return argv, file


def _help(program: str) -> str:
  """What the module that runs says of itself, then its own flags in the order of their definition."""
  module = sys.modules["__main__"]
  spec = module.__spec__
  own = [flag for flag in flags.FLAGS.get_key_flags_for_module(program) if flag.name not in _OF_ABSL]
  lines = []
  for flag in [*own, flags.FLAGS["compilation_cache"]]:
    kinds = getattr(flag.parser, "enum_values", None)
    value = "" if flag.boolean else f"={'|'.join(kinds)}" if kinds and len(kinds) < _MOST else "=..."
    default = "" if flag.default in (None, "", [], False) else f" [{str(flag.default_as_str).strip(chr(39))}]"
    lines.append(f"  --{flag.name}{value}")
    text = re.sub(r"^<.*?>: ", "", flag.help or "")  # absl's list of an enum's values
    lines += textwrap.wrap(f"{text}{default}", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
  return "\n".join([(module.__doc__ or "").strip(), "", "flags [and their defaults]:", *lines, "",
                    "--helpfull lists those of the libraries as well, such as --verbosity.",
                    f"python -m {spec.name.removesuffix('.__main__')} is the same command." if spec else ""]).rstrip()


def read_config(holder: flags.FlagHolder) -> ml_collections.ConfigDict:
  """The config of a `--config` flag; a file that cannot be loaded is a UserError."""
  try:
    holder.value.to_dict()
  except OSError as e:  # ml_collections reports a file that it could not load at first use
    cause = re.search(r"\[Errno \d+\] (.*)", _one_line(e))
    raise UserError(f"--config: {cause[1] if cause else _one_line(e)}") from e
  except AttributeError as e:
    raise UserError("--config: the file's get_config() returns no ConfigDict") from e
  return holder.value


def _config_message(error: Exception, argv: list[str]) -> str:
  text = _one_line(error).strip('"')
  hint = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text)
  if hint:
    return f"the config has no key {hint[2]!r}; did you mean {hint[1]!r}?"
  for path in re.findall(r"(?m)^--?config\.([\w.]+)", "\n".join(argv)):
    if path.rpartition(".")[2] == text.strip("'"):
      return f"the config has no key {path!r}; {suggest(path, config_files.list_keys(config_files.load('common')))}"
  return f"the config has no such key or value: {text} (configs/common.py lists all keys)"


def _one_line(error: Exception) -> str:
  return re.sub(r"\s+", " ", str(error).replace("\\n", " ")).strip()


def _fail(message: str, code: int = Exit.MISTAKE) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)
