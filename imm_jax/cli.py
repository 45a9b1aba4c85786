"""Starts a command: parses its flags, calls its `main`, and prints errors as one line, with an exit code."""

import contextlib
import difflib
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

# Characters that are printed of an error message of another package.
_MAX_MESSAGE = 300
# --help lists the values of a flag that has fewer than this.
_MAX_VALUES = 10
# Flags that absl adds to those of the module that runs.
_ABSL_FLAGS = ("help", "helpfull", "helpshort", "helpxml", "only_check_args")

_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", "auto", "The folder in which compiled programs are kept for later runs, or off. auto: the "
    "folder that JAX_COMPILATION_CACHE_DIR names, else imm_jax in the user's cache folder.")


def run(main: Callable[[], None], *, positional: Sequence[str] = (), resumes: bool = False) -> None:
  """Parses the flags and calls `main`; an error is printed as one line on stderr and sets the exit code (`Exit`).

  Args:
    main: the command, which reads its flags itself.
    positional: names of the flags that arguments without a name set, in this order; if the last one holds a list, it
      takes all remaining arguments.
    resumes: whether the same command resumes; others start over.
  """

  def parse(argv: list[str]) -> list[str]:
    if {"--help", "-help", "-h"}.intersection(itertools.takewhile(lambda arg: arg != "--", argv[1:])):
      with contextlib.suppress(BrokenPipeError):
        print(_format_help(argv[0]), flush=True)
      os._exit(Exit.DONE)  # skips Python's own cleanup, which would complain about a closed pipe
    file = None
    try:
      argv, file = _with_config_file(_keep_last(argv))
      with config_files.importable(file):
        arguments = flags.FLAGS(argv)
    except flags.Error as e:
      # ml_collections puts the traceback of a config file into the message.
      _fail(config_files.describe_failure(file, e, str(e)) if file and "Traceback" in str(e) else _explain_flag(e))
    except UserError as e:
      _fail(str(e))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      # ml_collections raises these for a config key or value that does not fit.
      in_file = file and (config_files.is_raised_in(file, e) or "get_config" in str(e))
      _fail(config_files.describe_failure(file, e) if file and in_file else _config_message(e, argv))
    except Exception as e:  # a config file is Python and may raise anything
      _fail(config_files.describe_failure(file, e) if file else _one_line(e))
    arguments = [*arguments[:1], *_set_positional(positional, arguments[1:])]
    if len(arguments) > 1:
      _fail(f"unexpected argument {arguments[1]!r}; options are given as --name=value (see --help)")
    return arguments

  def call(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # at INFO, libraries print what is of no use to users
    try:
      signals.install_handlers(resumes=resumes)
      compilation.enable_cache(_COMPILATION_CACHE.value)
      main()
      sys.stdout.flush()
    except PreemptedError as e:
      print(f"\n{e}", file=sys.stderr)
      sys.exit(exit_code(e))
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(1)
    except KeyboardInterrupt as e:
      print(f"\ninterrupted; {signals.resume_hint()}", file=sys.stderr)
      sys.exit(exit_code(e))
    except Exception as e:
      _exit_with(e)

  app.run(call, flags_parser=parse)


def _set_positional(positional: Sequence[str], arguments: list[str]) -> list[str]:
  """Sets these flags to the arguments without a name; returns the arguments that are left."""
  for name in positional:
    flag = flags.FLAGS[name]
    is_list = name == positional[-1] and isinstance(flag.parser, flags.ListParser)
    values = arguments if is_list else arguments[:1]
    if values and flag.present:
      _fail(f"{values[0]!r} is given without a name, which means --{name}, and --{name} is given as well; give one of "
            "them")
    if values:
      flag.value = values if is_list else values[0]
    arguments = arguments[len(values):]
  return arguments


def _exit_with(error: Exception) -> NoReturn:
  """Exits with an error's code after one line, or after a traceback if the error is a defect of the program."""
  if isinstance(error, AssertionError | RuntimeError) and "jax" in sys.modules:
    from imm_jax.runtime import hardware  # imported here because some commands do not need jax
    try:
      with hardware.explain_missing_platform():
        raise error
    except Exception as explained:
      error = explained
  code, message = exit_code(error), _one_line(error)[:_MAX_MESSAGE]
  if isinstance(error, UserError):
    _fail(str(error), code)
  if isinstance(error, OSError) and error.filename is not None:
    _fail(f"{error.filename}: {error.strerror}", code)
  if code == Exit.BUG:
    traceback.print_exception(error)
    print("error: this is a fault of imm_jax or of a library that it uses; see the lines above", file=sys.stderr)
    sys.exit(code)
  logging.info("a resource is lacking:", exc_info=error)  # printed with --verbosity=0
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message or "memory" in message.lower():
    _fail(f"the memory does not suffice ({message or type(error).__name__}); smaller batches take less "
          "(sample.batch_size, eval.batch_size, more of sft.accumulation), and --dry_run says how much a run will take",
          code)
  _fail(message or type(error).__name__, code)


def _keep_last(argv: Sequence[str]) -> list[str]:
  """Drops a `--config.KEY=VALUE` that is given again later; ml_collections would add up the items of tuples.

  >>> _keep_last(["imm", "--config.a=(1,)", "--config=tiny", "--config.a=(2,)"])
  ['imm', '--config=tiny', '--config.a=(2,)']
  """
  keys = [match[1] if (match := re.match(r"--?(config\.[\w.]+)=", arg)) else "" for arg in argv]
  return [arg for i, arg in enumerate(argv) if not keys[i] or keys[i] not in keys[i + 1:]]


def _explain_flag(error: flags.Error) -> str:
  """Explains in one line what absl says of a flag that is unknown or missing, or of its value.

  >>> _explain_flag(flags.Error("flag --method=liner: value should be one of <imm|linear>"))
  "--method='liner': did you mean linear?"
  >>> _explain_flag(flags.Error("flag --seed=no: invalid literal for int() with base 10: 'no'"))
  "--seed='no': expected a whole number"
  """
  text = _one_line(error)
  if isinstance(error, flags.UnrecognizedFlagError):
    return f"Unknown command line flag {error.flagname!r}; {_suggest_flag(error.flagname)}"
  if missing := re.findall(r"Flag --(\w+) must have a value other than None", text):
    if "config" in missing and (given := [arg for arg in sys.argv if re.match("--?config=", arg)]):
      return f"{given[-1]}: its get_config() returns None; its last line should be `return config`"
    return f"give {' and '.join(f'--{name}=...' for name in dict.fromkeys(missing))} (see --help)"
  if match := re.fullmatch(r"flag --([\w.]+)=(.*): value should be one of <(.*)>", text):
    return f"--{match[1]}={match[2]!r}: {suggest(match[2], match[3].split('|'))}"
  if match := re.fullmatch(r"flag --([\w.]+)=(.*): (invalid literal for int|could not convert .* float).*", text):
    return f"--{match[1]}={match[2]!r}: expected a {'whole ' * match[3].endswith('int')}number"
  return text


def _suggest_flag(name: str) -> str:
  """Returns a hint for an unknown flag: settings of this name, or the nearest flag."""
  if "config" in flags.FLAGS:
    from imm_jax import config_keys  # imported here because most commands take no config
    keys = config_files.list_keys(config_keys.load_defaults())
    if same := [f"--config.{key}" for key in keys if key.rpartition(".")[2] == name]:
      return f"did you mean {' or '.join(same)}?"
  own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]) if flag.name not in _ABSL_FLAGS]
  close = next((flag for flag in own if name.startswith(flag[:3])), "") or next(
      iter(difflib.get_close_matches(name, own, n=1)), "")
  return f"did you mean --{close}?" if close else "see --help"


def _with_config_file(argv: list[str]) -> tuple[list[str], Path | None]:
  """Returns the arguments with the path of the config file in place of its name, and that path."""
  argv, file = list(argv), None
  if "config" not in flags.FLAGS:
    return argv, file
  for i, arg in enumerate(argv):
    match = re.fullmatch(r"(--?config=)(.+)", arg, re.DOTALL)
    if not match and (arg not in ("--config", "-config") or i + 1 == len(argv)):
      continue
    position, flag, value = (i, match[1], match[2]) if match else (i + 1, "", argv[i + 1])
    path, colon, argument = value.partition(":")
    file = config_files.find(path)
    argv[position] = f"{flag}{file}{colon}{argument}"
  return argv, file


def _format_help(program: str) -> str:
  """Returns the docstring of the module that runs, then its own flags in the order of their definition."""
  module = sys.modules["__main__"]
  spec = module.__spec__
  own = [flag for flag in flags.FLAGS.get_key_flags_for_module(program) if flag.name not in _ABSL_FLAGS]
  lines = []
  for flag in [*own, flags.FLAGS["compilation_cache"]]:
    choices = getattr(flag.parser, "enum_values", None)
    value = "" if flag.boolean else f"={'|'.join(choices)}" if choices and len(choices) < _MAX_VALUES else "=..."
    default = "" if flag.default in (None, "", [], False) else f" [{str(flag.default_as_str).strip(chr(39))}]"
    lines.append(f"  --{flag.name}{value}")
    # absl puts an enum's values at the beginning, and a remark at the end.
    text = re.sub(r"^<.*?>: |;\s+repeat this option.*", "", flag.help or "", flags=re.DOTALL)
    lines += textwrap.wrap(f"{text}{default}", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
  return "\n".join([(module.__doc__ or "").strip(), "", "flags [and their defaults]:", *lines, "",
                    "--helpfull lists those of the libraries as well, such as --verbosity.",
                    f"python -m {spec.name.removesuffix('.__main__')} is the same command." if spec else ""]).rstrip()


def read_config(holder: flags.FlagHolder) -> ml_collections.ConfigDict:
  """Returns the config of a `--config` flag.

  Raises:
    UserError: when the file cannot be loaded, or its `get_config` returns no ConfigDict.
  """
  try:
    holder.value.to_dict()
  except OSError as e:  # ml_collections reports a file that it could not load at first use
    cause = re.search(r"\[Errno \d+\] (.*)", _one_line(e))
    raise UserError(f"--config: {cause[1] if cause else _one_line(e)}") from e
  except AttributeError as e:
    raise UserError("--config: the file's get_config() returns no ConfigDict") from e
  return holder.value


def _config_message(error: Exception, argv: list[str]) -> str:
  """Explains an error that ml_collections raised for a config file or a `--config.KEY=VALUE`."""
  from imm_jax import config_keys  # imported here because most commands take no config
  if explained := config_keys.explain(error):
    return explained
  text = _one_line(error).strip('"')
  hint = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text)
  if hint:
    known = config_files.list_keys(config_keys.load_defaults())
    paths = [path for path in re.findall(r"(?m)^--?config\.([\w.]+)", "\n".join(argv))
             if path.rpartition(".")[2] == hint[2] and path not in known]
    path = paths[-1] if paths else hint[2]
    return f"the config has no key {path!r}; did you mean {path.removesuffix(hint[2]) + hint[1]!r}?"
  for path in re.findall(r"(?m)^--?config\.([\w.]+)", "\n".join(argv)):
    if path.rpartition(".")[2] == text.strip("'"):
      return f"the config has no key {path!r}; {config_keys.suggest_key(path)}"
  return f"the config has no such key or value: {text} (configs/common.py lists all keys)"


def _one_line(error: Exception) -> str:
  return re.sub(r"\s+", " ", str(error).replace("\\n", " ")).strip()


def _fail(message: str, code: int = Exit.MISTAKE) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)
