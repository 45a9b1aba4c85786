"""HTTP client of a vLLM server: completions through its OpenAI-compatible API, and reloading of weights.

Responses are not trusted: their size and duration are limited, and their contents are validated. There are two kinds of
errors. A `ServerError` is transient or specific to one server: the request can be retried, there or at another server.
A `UserError` means that the server rejected the request itself (HTTP 4xx), as other servers would.
"""

import functools
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import urllib3

from imm_jax.errors import UserError

# Limits on the size of a response: a constant, and an amount for each token that was requested.
_MAX_BYTES, _MAX_BYTES_PER_TOKEN = 1 << 20, 512
_CHUNK = 1 << 16
_CONNECT_TIMEOUT_S = 10.0
_QUICK_TIMEOUT_S = 30.0  # for requests that take no work
_BUSY_STATUSES = (408, 425, 429)
_SERVER_STATUSES = (401, 403, 404, 405)  # the server is at fault, not the request
# A request is answered by the data-parallel replica with the number in this header. There are never so many.
_REPLICA_HEADER, _NO_REPLICA = "X-data-parallel-rank", 1 << 30
# Overrides the defaults that a server may take from a checkpoint's generation_config.json.
NEUTRAL = {"ignore_eos": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
           "frequency_penalty": 0.0, "skip_special_tokens": False}
# With these a host that disappears is noticed after about a minute, even during a long request.
_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)) if hasattr(socket, name)]


class ServerError(Exception):
  """Reports that a server does not respond, or responds with something invalid."""


class TimedOutError(ServerError):
  """Reports that a response timed out; a retry at the same server would take as long."""


class _UnavailableError(ServerError):
  """Reports that a server lacks an endpoint or denies access to it."""


class Generated(NamedTuple):
  """Holds one choice of a completion response.

  Attributes:
    tokens: drawn token ids, including the one that ended the sample.
    logprobs: their log-probabilities if requested, otherwise empty.
    finish: `stop` or `length`.
  """

  tokens: list[int]
  logprobs: list[float]
  finish: str


class Server:
  """Talks to a vLLM server at a URL such as http://host:8000; thread-safe."""

  def __init__(self, url: str, *, connections: int = 1, timeout: float = 600.0):
    """Checks the URL; does not connect yet.

    Args:
      url: URL without a path.
      connections: number of connections to keep open.
      timeout: seconds that a completion may take, including the wait in the server's queue.

    Raises:
      UserError: when the URL is malformed.
    """
    try:
      parts = urllib3.util.parse_url(url)
    except urllib3.exceptions.LocationParseError:
      parts = urllib3.util.Url()
    if parts.scheme not in ("http", "https") or not parts.host or parts.path not in (None, "/") or parts.query:
      raise UserError(f"{url}: expected the URL of a server, such as http://host:8000")
    self.url = url.rstrip("/")
    self._timeout = timeout
    # No proxy: the servers are on this machine or on a private network.
    self._pool = urllib3.PoolManager(maxsize=connections, retries=False, socket_options=_KEEPALIVE)
    key = os.environ.get("VLLM_API_KEY")
    self._headers = {"Authorization": f"Bearer {key}"} if key else {}
    self._model = ""

  def __str__(self) -> str:
    return self.url

  def alive(self) -> bool:
    """Returns whether retrying makes sense; always true for a remote server."""
    return True

  def log_tail(self) -> str:
    """Returns the end of its log if available."""
    return ""

  def close(self) -> None:
    """Closes idle connections."""
    self._pool.clear()

  def check_health(self) -> None:
    """Raises ServerError unless the server is ready for requests."""
    self._call("GET", "/health", timeout=_QUICK_TIMEOUT_S, parse=False)

  def version(self) -> str:
    """Returns the version of vLLM."""
    return str(_field(self._call("GET", "/version", timeout=_QUICK_TIMEOUT_S), "version", str))

  def can_reload(self) -> bool:
    """Returns whether it has the endpoints that `reload` needs."""
    try:
      self.weights()
    except (ServerError, UserError):
      return False
    return True

  def weights(self) -> str:
    """Returns the version of its weights, as set by `reload`."""
    return _field(self._call("GET", "/weight_info", timeout=_QUICK_TIMEOUT_S), "weight_version", str)

  def model(self) -> dict[str, Any]:
    """Returns the served model: `id`, its name in requests; `root`, the folder it was loaded from; `max_model_len`."""
    models = _field(self._call("GET", "/v1/models", timeout=_QUICK_TIMEOUT_S), "data", list)
    if not models or not isinstance(models[0], dict) or not isinstance(models[0].get("id"), str):
      raise ServerError("it serves no model")
    self._model = models[0]["id"]
    return models[0]

  def complete(self, prompt: list[int], *, n: int, max_tokens: int, logprobs: bool = False,
               replica: int | None = None, **options: Any) -> list[Generated]:
    """Continues a prompt n times.

    Args:
      prompt: token ids.
      n: number of completions.
      max_tokens: maximum number of tokens of each.
      logprobs: whether to request the log-probabilities of the drawn tokens.
      replica: number of the data-parallel replica that answers; None lets the server choose.
      **options: more keys of the request, such as `temperature`.

    Returns:
      The n completions, in the order of their seeds.

    Raises:
      ServerError: when the response is missing or invalid.
      UserError: when the server rejects the request.
    """
    if not self._model:
      self.model()
    body = {"model": self._model, "prompt": prompt, "n": n, "max_tokens": max_tokens, "return_token_ids": True,
            "logprobs": 1 if logprobs else None, **options}
    answer = self._call("POST", "/v1/completions", {k: v for k, v in body.items() if v is not None},
                        headers={} if replica is None else {_REPLICA_HEADER: str(replica)}, timeout=self._timeout,
                        max_bytes=_MAX_BYTES + _MAX_BYTES_PER_TOKEN * n * max_tokens)
    choices = _field(answer, "choices", list)
    numbers = [choice.get("index") if isinstance(choice, dict) else None for choice in choices]
    if len(numbers) != n or any(i not in numbers for i in range(n)):
      raise ServerError(f"it gave completions {numbers!s:.99}, and {n} were asked for")
    by_index = dict(zip(numbers, choices, strict=True))
    return [_generated(by_index[i], max_tokens, logprobs) for i in range(n)]

  def count_replicas(self, prompt: list[int]) -> int | None:
    """Counts the data-parallel replicas at this URL, each of which has weights and a cache of its own.

    The server names the number when it refuses a request to a replica that it cannot have (vLLM 0.32).

    Args:
      prompt: token ids of any prompt that the server would continue.

    Returns:
      The number; None if the server, or a proxy before it, knows nothing of replicas.

    Raises:
      ServerError: when the response is missing or invalid.
      UserError: when the server rejects the request for another reason.
    """
    try:
      self.complete(prompt, n=1, max_tokens=1, logprobs=True, replica=_NO_REPLICA, temperature=0.0, **NEUTRAL)
    except UserError as e:
      if "data_parallel_rank" not in str(e):
        raise
      count = re.search(r"out of range \[0, (\d+)\)", str(e))
      return int(count[1]) if count else None
    return None

  def reload(self, folder: str, version: str, *, timeout: float) -> None:
    """Makes the server load the weights in `folder` and reset its prefix cache; aborts running requests.

    If a step fails, the server stays paused, because its weights may be a mixture of old and new ones.

    Args:
      folder: checkpoint of the same architecture, at its path on the server.
      version: name of the weights, which `weights` returns from then on.
      timeout: seconds that each step may take.

    Raises:
      ServerError: when a step fails, or the server lacks the endpoints.
    """
    call = functools.partial(self._call, "POST", timeout=timeout)
    try:
      call("/pause?mode=abort")
      self._load(folder, version, call)
      call("/resume")
    except _UnavailableError as e:
      raise ServerError(f"{e}; reloading needs vLLM 0.32 or newer, started with VLLM_SERVER_DEV_MODE=1 in its "
                        "environment, or give config.sampler.vllm.restart") from e

  def sleep(self, *, timeout: float) -> None:
    """Makes the server discard its weights and its cache (level 2), so that others can use the memory of its GPUs.

    Raises:
      ServerError: when it does not, as one that was started without `--enable-sleep-mode`.
    """
    self._call("POST", "/sleep?level=2&mode=abort", timeout=timeout)
    if not _field(self._call("GET", "/is_sleeping", timeout=timeout), "is_sleeping", bool):
      raise ServerError("it does not sleep")

  def wake(self, folder: str, version: str, *, timeout: float) -> None:
    """Makes a server that sleeps load the weights in `folder`; takes and raises what `reload` does."""
    call = functools.partial(self._call, "POST", timeout=timeout)
    call("/wake_up?tags=weights")  # the cache comes after the weights, which may need its memory while they are loaded
    self._load(folder, version, call, lambda: call("/wake_up?tags=kv_cache"))
    if _field(self._call("GET", "/is_sleeping", timeout=timeout), "is_sleeping", bool):
      raise ServerError("it does not wake up")

  def _load(self, folder: str, version: str, call: Callable[..., Any], then: Callable[[], Any] = lambda: None) -> None:
    """Makes the server load weights, calls `then`, and resets what was cached with the old weights."""
    call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
    then()
    if not _field(call("/reset_prefix_cache"), "success", bool):
      raise ServerError("its prefix cache cannot be reset")
    call("/update_weight_version", {"new_version": version})
    if (current := self.weights()) != version:
      raise ServerError(f"it says that its weights are {current!r:.99} and not {version!r}")

  def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float,
            max_bytes: int = _MAX_BYTES, parse: bool = True, headers: dict[str, str] | None = None) -> Any:
    """Sends a request and returns the JSON object of the response, or None unless `parse`."""
    end = time.monotonic() + timeout
    try:
      response = self._pool.request(
          method, self.url + path, json=body, headers=self._headers | (headers or {}), preload_content=False,
          redirect=False, timeout=urllib3.Timeout(connect=min(_CONNECT_TIMEOUT_S, timeout), read=timeout))
      try:
        data = bytearray()
        for chunk in response.stream(_CHUNK, decode_content=False):
          data += chunk
          if len(data) > max_bytes:
            raise ServerError(f"its answer to {path} has more than {max_bytes} bytes")
          if time.monotonic() > end:
            raise TimedOutError(f"its answer to {path} takes more than {timeout:g} s")
      except BaseException:
        response.close()  # closes the connection, because the rest of the body is unread
        raise
      response.release_conn()
    except urllib3.exceptions.ReadTimeoutError as e:
      raise TimedOutError(f"it has not answered {path} for {timeout:g} s") from e
    except urllib3.exceptions.HTTPError as e:
      raise ServerError(f"{path}: {e}") from e
    if response.status in _SERVER_STATUSES:
      raise _UnavailableError(f"{path}: the server refuses (HTTP {response.status}): {_excerpt(data)}")
    if 400 <= response.status < 500 and response.status not in _BUSY_STATUSES:
      raise UserError(f"{self.url}{path}: the server refuses (HTTP {response.status}): {_excerpt(data)}")
    if response.status != 200:
      raise ServerError(f"{path}: HTTP {response.status}: {_excerpt(data)}")
    if not parse:
      return None
    try:
      value = json.loads(data)
    except (ValueError, RecursionError) as e:
      raise ServerError(f"{path}: its answer is not JSON: {_excerpt(data)}") from e
    if not isinstance(value, dict):
      raise ServerError(f"{path}: its answer is no JSON object: {_excerpt(data)}")
    return value


def _field(answer: dict[str, Any], name: str, kind: type) -> Any:
  value = answer.get(name)
  if not isinstance(value, kind):
    raise ServerError(f"{name!r} is missing in its answer, or no {kind.__name__}")
  return value


def _generated(choice: dict[str, Any], max_tokens: int, logprobs: bool) -> Generated:
  tokens, finish = choice.get("token_ids"), choice.get("finish_reason")
  if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
    raise ServerError("its answer has no token_ids; it needs vLLM 0.10.2 or newer")
  if not 1 <= len(tokens) <= max_tokens or finish not in ("stop", "length") or (
      finish == "length" and len(tokens) < max_tokens):
    raise ServerError(f"a completion of {len(tokens)} tokens of {max_tokens} ended with {finish!r:.99}")
  if not logprobs:
    return Generated(tokens, [], finish)
  entry = choice.get("logprobs")
  values = entry.get("token_logprobs") if isinstance(entry, dict) else None
  if not isinstance(values, list) or len(values) != len(tokens) or not all(
      isinstance(v, float) and math.isfinite(v) for v in values):
    raise ServerError("its answer has no log-probability for each token")
  return Generated(tokens, values, finish)


def _excerpt(data: bytes) -> str:
  """Returns the beginning of a response body, in one line."""
  return " ".join(data[:2000].decode(errors="replace").split())[:300] or "nothing"
