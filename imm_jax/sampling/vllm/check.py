"""`python -m imm_jax.sampling.vllm --check`: reports whether a usable vLLM is available."""

import os
import subprocess

from absl import flags

from imm_jax.errors import UserError
from imm_jax.sampling.vllm import server as vllm_server
from imm_jax.sampling.vllm.client import Server, ServerError

_CHECK = flags.DEFINE_bool("check", False, "Say which vLLM is there; all that this program does.")
_PYTHON = flags.DEFINE_string("python", "", "The python of an environment with vLLM, as in sampler.vllm.python.")
_URLS = flags.DEFINE_list("urls", [], "Servers, as in sampler.vllm.urls.")
_TIMEOUT_S = 600
_SCRIPT = """
import platform
import vllm.entrypoints.openai.api_server
import torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print("vLLM", vllm.__version__, "torch", torch.__version__, "Python", platform.python_version(),
      "GPUs:", ", ".join(gpus) or "none")
"""


def main() -> None:
  """Prints a line for the environment or for each server; raises UserError if none is usable."""
  if not _CHECK.value or bool(_PYTHON.value) == bool(_URLS.value):
    raise UserError("give --check, and --python=PROGRAM or --urls=URL,...")
  if _PYTHON.value:
    print(f"{_PYTHON.value}: {describe_environment(_PYTHON.value)}")
    return
  usable = 0
  for url in _URLS.value:
    try:
      print(f"{url}: {describe_server(Server(url))}")
      usable += 1
    except (ServerError, UserError) as e:
      print(f"{url}: not usable: {e}")
  if not usable:
    raise UserError("no server can be used")


def describe_environment(python: str) -> str:
  """Describes the vLLM of an interpreter; raises UserError if it cannot be imported."""
  python = vllm_server.find_python(python)
  try:
    result = subprocess.run([python, "-c", _SCRIPT], capture_output=True, text=True, errors="replace", check=False,
                            timeout=_TIMEOUT_S, env=vllm_server.environment(python, os.environ))
  except subprocess.TimeoutExpired as e:
    raise UserError(f"{python}: importing vLLM takes more than {_TIMEOUT_S} s") from e
  description = result.stdout.strip().rpartition("\n")[2]
  if result.returncode or not description.startswith("vLLM "):
    reason = result.stderr.strip().rpartition("\n")[2] or "it says nothing"
    raise UserError(f"{python}: vLLM cannot be imported ({reason}); install it there with `pip install vllm`")
  return description


def describe_server(server: Server) -> str:
  """Describes a server: its version, its model, and whether it can reload weights."""
  server.check_health()
  version, model = server.version(), server.model()
  reloads = "reloads weights" if server.can_reload() else (
      "cannot reload weights (start it with VLLM_SERVER_DEV_MODE=1 in its environment)")
  return (f"vLLM {version}, serves {model['id']!r} from {model.get('root')}, context {model.get('max_model_len')}; "
          f"{reloads}")
