"""Keeps compiled programs for later processes: jax's persistent compilation cache, in the user's cache folder.

The key of an entry is the program, its shapes, the compiler's options and versions, and the kind of device, so that a
second start compiles nothing again. Each kind of CPU has its own folder, because compiled code may use instructions
that another CPU lacks, and several machines may share a home folder.
"""

import hashlib
import os
import platform
import re
import tempfile
from pathlib import Path

import jax

from imm_jax.errors import print_once

# A program that compiles faster than this is not kept, since reading it would take as long.
_MIN_SECONDS = 0.1
# The oldest entries are removed when the folder is larger than this.
_MAX_BYTES = 4 << 30
_DIR, _ON = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"


def enable_cache(setting: str = "auto") -> Path | None:
  """Turns on jax's persistent compilation cache for this process and the processes that it starts.

  Several processes may share the folder: entries are written atomically, and a program whose entry cannot be read is
  compiled again.

  Args:
    setting: a folder; `off`; or `auto` for the folder that JAX_COMPILATION_CACHE_DIR names, by default `imm_jax` in the
      user's cache folder. JAX_ENABLE_COMPILATION_CACHE=false turns `auto` off.

  Returns:
    The folder, or None if the cache is off or the folder cannot be written.
  """
  if setting == "off" or (setting == "auto" and not jax.config.jax_enable_compilation_cache):
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ[_ON] = "false"
    return None
  path = (jax.config.jax_compilation_cache_dir or "") if setting == "auto" else setting
  folder = Path(path).expanduser().absolute() if path else _user_folder()
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever can write there can run code in this process
    _prune(folder)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as e:
    print_once(f"warning: compiled programs are not kept, for {folder} cannot be written ({e.strerror})")
    return None
  _write_atomically()
  jax.config.update("jax_enable_compilation_cache", True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
  os.environ.update({_DIR: str(folder), _ON: "true",
                     "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(_MIN_SECONDS)})
  return folder


def _user_folder() -> Path:
  """Returns `imm_jax/jit-KIND` in the user's cache folder, where KIND identifies this kind of CPU."""
  try:
    info = Path("/proc/cpuinfo").read_text()
    features = re.findall(r"(?m)^(?:model name|flags|Features)\s*:\s*(.*)$", info.partition("\n\n")[0])
  except OSError:
    features = []
  kind = hashlib.sha256(repr((platform.machine(), platform.processor(), features)).encode()).hexdigest()[:8]
  cache = os.environ.get("XDG_CACHE_HOME", "")
  return (Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()) / "imm_jax" / f"jit-{kind}"


def _prune(folder: Path) -> None:
  """Removes the oldest entries until the rest is at most _MAX_BYTES."""
  entries = sorted(((s := path.stat()).st_mtime, s.st_size, path) for path in folder.glob("*-cache"))
  excess = sum(size for _, size, _ in entries) - _MAX_BYTES
  for _, size, path in entries:
    if excess <= 0:
      break
    path.unlink(missing_ok=True)  # another process may have removed it
    excess -= size


def _write_atomically() -> None:
  """Makes jax write each entry to a temporary file and rename it.

  By itself jax writes in place: a killed process or a full disk would leave half an entry, which is never written
  again, and another process could read an entry while it is being written.
  """
  from jax._src import lru_cache

  def put(cache: lru_cache.LRUCache, key: str, value: bytes) -> None:
    target = Path(str(cache.path)) / f"{key}-cache"
    if cache.eviction_enabled or "://" in str(cache.path):  # the user chose these settings, which jax handles
      original(cache, key, value)
    elif not target.exists():
      handle, part = tempfile.mkstemp(dir=target.parent, prefix=".part-")
      try:
        with os.fdopen(handle, "wb") as f:
          f.write(value)
        os.replace(part, target)
      except OSError:
        os.unlink(part)
        raise  # jax prints a warning and goes on

  original = lru_cache.LRUCache.put
  if original.__name__ == "put" and original.__module__ == lru_cache.__name__:  # not yet replaced
    lru_cache.LRUCache.put = put
