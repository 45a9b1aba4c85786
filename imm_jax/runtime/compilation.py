"""Keeps compiled programs for later processes: jax's persistent compilation cache, in the user's cache folder.

The key of an entry is the program, its shapes, the compiler's options and versions, and the kind of device, so that a
second start compiles nothing again. Each kind of CPU has its own folder, because compiled code may use instructions
that another CPU lacks, and several machines may share a home folder.
"""

import contextlib
import hashlib
import os
import platform
import re
import stat
import tempfile
import time
from pathlib import Path

import jax

from imm_jax import files
from imm_jax.errors import print_once

# A program that compiles faster than this is not kept, since reading it would take as long.
_MIN_SECONDS = 0.1
# The least recently used entries are removed when the folder is larger than this.
_MAX_BYTES = 4 << 30
# Name of an entry while it is written, and seconds after which its process must be gone.
_PART, _PART_SECONDS = ".part-", 3600.0
_DIR, _ON = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"


def enable_cache(setting: str = "auto") -> Path | None:
  """Turns on jax's persistent compilation cache for this process and the processes that it starts.

  Several processes may share the folder: entries are written atomically, and a program whose entry cannot be read is
  compiled again, and its entry replaced.

  Args:
    setting: a folder; `off`; or `auto` for the folder that JAX_COMPILATION_CACHE_DIR names, by default `imm_jax` in the
      user's cache folder. JAX_ENABLE_COMPILATION_CACHE=false turns `auto` off.

  Returns:
    The folder, or None if the cache is off, or the folder cannot be written or others can write there.
  """
  if setting == "off" or (setting == "auto" and not jax.config.jax_enable_compilation_cache):
    return _turn_off()
  path = (jax.config.jax_compilation_cache_dir or "") if setting == "auto" else setting
  folder = Path(path).expanduser().absolute() if path else _user_folder()
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if _is_writable_by_others(folder):
      print_once(f"warning: compiled programs are not kept, for other users can write to {folder}, and what lies there "
                 f"is run: `chmod go-w {folder}`, or name another folder")
      return _turn_off()  # jax itself would use a folder that the environment names
    _prune(folder)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as e:
    print_once(f"warning: compiled programs are not kept, for {folder} cannot be written ({e.strerror})")
    return None
  _change_jax()
  jax.config.update("jax_enable_compilation_cache", True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
  os.environ.update({_DIR: str(folder), _ON: "true",
                     "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(_MIN_SECONDS)})
  return folder


def _turn_off() -> None:
  jax.config.update("jax_enable_compilation_cache", False)
  os.environ[_ON] = "false"


def _user_folder() -> Path:
  """Returns `imm_jax/jit-KIND` in the cache folder, where KIND identifies this kind of CPU."""
  try:
    info = Path("/proc/cpuinfo").read_text()
    features = re.findall(r"(?m)^(?:model name|flags|Features)\s*:\s*(.*)$", info.partition("\n\n")[0])
  except OSError:
    features = []
  kind = hashlib.sha256(repr((platform.machine(), platform.processor(), features)).encode()).hexdigest()[:8]
  return files.cache_folder() / f"jit-{kind}"


def _is_writable_by_others(folder: Path) -> bool:
  """Returns whether users other than this one can write to a folder; those of its own group are trusted."""
  status = folder.stat()
  return bool(status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid()))


def _prune(folder: Path) -> None:
  """Removes what killed processes left, and the entries not used for longest until the rest is at most _MAX_BYTES."""
  for path in folder.glob(f"{_PART}*"):
    with contextlib.suppress(FileNotFoundError):  # another process may have removed it
      if path.stat().st_mtime < time.time() - _PART_SECONDS:
        path.unlink()
  entries = sorted(((s := path.stat()).st_mtime, s.st_size, path) for path in folder.glob("*-cache"))
  excess = sum(size for _, size, _ in entries) - _MAX_BYTES
  for _, size, path in entries:
    if excess <= 0:
      break
    path.unlink(missing_ok=True)  # another process may have removed it
    excess -= size


def _change_jax() -> None:
  """Makes jax write each entry to a temporary file and rename it, and date entries by their last use.

  By itself jax writes in place, and never to an entry that exists: a killed process or a full disk would leave half an
  entry for ever, and another process could read an entry while it is being written.
  """
  from jax._src import lru_cache

  def is_ours(cache: lru_cache.LRUCache) -> bool:  # or else the user chose settings that jax handles
    return not cache.eviction_enabled and "://" not in str(cache.path)

  def get(cache: lru_cache.LRUCache, key: str) -> bytes | None:
    value = plain_get(cache, key)
    if value is not None and is_ours(cache):
      with contextlib.suppress(OSError):
        os.utime(Path(str(cache.path)) / f"{key}-cache")
    return value

  def put(cache: lru_cache.LRUCache, key: str, value: bytes) -> None:
    if not is_ours(cache):
      plain_put(cache, key, value)
      return
    # An entry that exists could not be read, or else jax would not have compiled; or another process was as fast.
    target = Path(str(cache.path)) / f"{key}-cache"
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=_PART)
    try:
      with os.fdopen(handle, "wb") as f:
        f.write(value)
      os.replace(part, target)
    except OSError:
      os.unlink(part)
      raise  # jax prints a warning and goes on

  plain_get, plain_put = lru_cache.LRUCache.get, lru_cache.LRUCache.put
  if plain_put.__module__ == lru_cache.__name__:  # not yet replaced
    lru_cache.LRUCache.get, lru_cache.LRUCache.put = get, put
