"""Compiled programs that outlive the process: jax's persistent cache, in the user's cache folder.

What is kept is found again by the program, its shapes, the compiler's options and versions, and the kind of device, so
a second start compiles nothing that the first one did. A folder is for one kind of CPU: compiled code may use
instructions that another lacks, and a home folder may be on a network.
"""

import hashlib
import os
import platform
import re
import tempfile
from pathlib import Path

import jax

from imm_jax.errors import print_once

# Programs that compile faster are as quickly compiled as read.
_MIN_SECONDS = 0.1
# The oldest go first.
_MAX_BYTES = 4 << 30
_DIR, _ON = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"


def enable_cache(setting: str = "auto") -> Path | None:
  """Keeps what this process, and those that it starts, compile, and uses what others have kept.

  Several processes may share the folder: an entry appears whole or not at all, and one that cannot be read is compiled
  again.

  Args:
    setting: `auto` for the folder that JAX_COMPILATION_CACHE_DIR names, else `imm_jax` in the user's cache folder;
      a folder; or `off`. JAX_ENABLE_COMPILATION_CACHE=false turns `auto` off.

  Returns:
    The folder, or None where nothing is kept.
  """
  if setting == "off" or (setting == "auto" and not jax.config.jax_enable_compilation_cache):
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ[_ON] = "false"
    return None
  given = (jax.config.jax_compilation_cache_dir or "") if setting == "auto" else setting
  folder = Path(given).expanduser().absolute() if given else _user_folder()
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # who can write there can run code here
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
  """`imm_jax/jit-KIND` in the user's cache folder, KIND of this CPU."""
  try:
    info = Path("/proc/cpuinfo").read_text()
    found = re.findall(r"(?m)^(?:model name|flags|Features)\s*:\s*(.*)$", info.partition("\n\n")[0])
  except OSError:
    found = []
  kind = hashlib.sha256(repr((platform.machine(), platform.processor(), found)).encode()).hexdigest()[:8]
  cache = os.environ.get("XDG_CACHE_HOME", "")
  return (Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()) / "imm_jax" / f"jit-{kind}"


def _prune(folder: Path) -> None:
  """Removes the oldest entries where all are more than _MAX_BYTES."""
  found = sorted(((s := path.stat()).st_mtime, s.st_size, path) for path in folder.glob("*-cache"))
  excess = sum(size for _, size, _ in found) - _MAX_BYTES
  for _, size, path in found:
    if excess <= 0:
      break
    path.unlink(missing_ok=True)  # another process may be at it, too
    excess -= size


def _write_atomically() -> None:
  """Has jax write each entry beside its place and rename it.

  By itself it writes in place: a process that is killed, or a disk that is full, would leave a part, which is never
  written again, and another process may read what is being written.
  """
  from jax._src import lru_cache

  def put(cache: lru_cache.LRUCache, key: str, value: bytes) -> None:
    target = Path(str(cache.path)) / f"{key}-cache"
    if cache.eviction_enabled or "://" in str(cache.path):  # the user's own settings
      plain(cache, key, value)
    elif not target.exists():
      handle, part = tempfile.mkstemp(dir=target.parent, prefix=".part-")
      try:
        with os.fdopen(handle, "wb") as f:
          f.write(value)
        os.replace(part, target)
      except OSError:
        os.unlink(part)
        raise  # jax says so, and goes on

  plain = lru_cache.LRUCache.put
  if plain.__name__ == "put" and plain.__module__ == lru_cache.__name__:  # not yet replaced
    lru_cache.LRUCache.put = put
