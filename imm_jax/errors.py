"""Errors that a user can mend: shown as one line, without a traceback."""


class UserError(Exception):
  """A mistake in the config, the files or the environment.

  The message says what was wrong, where (file, key, line), and what would be right. The command line
  tools print it as `error: ...` on stderr and exit with code 1; library callers catch it like any exception.
  """
