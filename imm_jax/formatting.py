"""Formats sizes and durations for messages and reports."""


def format_size(num_bytes: float) -> str:
  """Formats a number of bytes in the binary unit that suits it.

  >>> format_size(950), format_size(3 << 19), format_size(15_340_000_000)
  ('950 bytes', '1.5 MiB', '14.3 GiB')
  """
  for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if num_bytes >= factor:
      return f"{num_bytes / factor:.1f} {unit}"
  return f"{num_bytes:.0f} bytes"


def format_duration(seconds: float) -> str:
  """Formats a duration with at most two units.

  >>> format_duration(8.4), format_duration(100), format_duration(7260), format_duration(200000)
  ('8 s', '1 min 40 s', '2 h 1 min', '55 h 33 min')
  """
  minutes, rest = divmod(round(seconds), 60)
  if not minutes:
    return f"{rest} s"
  return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
