"""A server that speaks as much of vLLM's HTTP API as the client needs, and misbehaves where told to.

Its answers are random tokens that follow from the prompt and the seed; where log-probabilities are asked for, the
greedy ones of transformers' model. As a program it takes the arguments of vLLM's server, and `--fake=` what to do:
`never-healthy`, `dies`, `orphan` (a child in a session of its own), or `greedy` (its answers are the model's).
"""

import functools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

VOCABULARY = range(1, 500)
END = 0


def tokens_of(prompt: list[int], seed: int | None, temperature: float, most: int) -> list[int]:
  """What the server draws."""
  rng = random.Random(f"{prompt} {seed if temperature else None} {temperature}")
  tokens = [rng.choice(VOCABULARY) for _ in range(rng.randint(1, 2 * most))]
  return tokens[:most] if len(tokens) >= most else [*tokens, END]


@functools.cache
def greedy(folder: str, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
  """Tokens and their log-probabilities, by transformers."""
  import torch

  model, tokens, logprobs = _model(folder), list(prompt), []
  for _ in range(count):
    with torch.no_grad():
      scores = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    tokens.append(int(scores.argmax()))
    logprobs.append(float(scores.max()))
  return tokens[len(prompt):], logprobs


@functools.cache
def _model(folder: str):
  import torch
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class FakeVllm:
  """A server in threads of this process; use as a context manager.

  Attributes:
    folder: whose weights it says that it runs.
    replicas: number of data-parallel replicas; None if it knows nothing of them.
    folders: whose weights single replicas run instead, by number.
    probed: replicas that were asked for log-probabilities.
    trouble: called with (number of the request, its body); "" for an answer, or one of `_Handler.TROUBLES`.
    draw: as `tokens_of`.
    seen: the bodies of completions that were asked for, log-probabilities aside.
    answered: those of them that were answered.
    steps: paths of what was asked for beside.
  """

  def __init__(self, folder: str | Path, *, trouble: Callable[[int, dict], str] = lambda number, body: "",
               port: int = 0):
    self.folder, self.trouble, self.draw = str(folder), trouble, tokens_of
    self.healthy, self.dev, self.stale, self.resets = True, True, False, True
    self.version: str | None = "default"
    self.asleep, self.sleeps = set(), True
    self.replicas: int | None = 1
    self.folders: dict[int | None, str] = {}
    self.probed: list[int | None] = []
    self.seen: list[dict] = []
    self.answered: list[dict] = []
    self.steps: list[str] = []
    self.lock = threading.Lock()
    handler = type("Handler", (_Handler,), {"fake": self})
    self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
    self.http.daemon_threads = True
    self.connections: set[socket.socket] = set()
    self.url = f"http://127.0.0.1:{self.http.server_port}"

  def __enter__(self) -> "FakeVllm":
    threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self.kill()

  def kill(self) -> None:
    """Closes every connection, as a killed process does."""
    self.http.shutdown()
    self.http.server_close()
    for connection in list(self.connections):
      try:
        connection.shutdown(socket.SHUT_RDWR)
      except OSError:
        continue  # it was closed already

  def act(self, path: str, body: dict, query: str = "") -> dict:
    """Answers what has to do with weights."""
    self.steps.append(path)
    if path == "/collective_rpc":
      assert body["method"] == "reload_weights"
      if not self.stale:
        self.folder = body["kwargs"]["weights_path"]
    if path == "/update_weight_version" and self.version is not None:
      self.version = body["new_version"]
    if path == "/sleep":
      assert "level=2" in query
      self.asleep = {"weights", "kv_cache"} if self.sleeps else set()
    if path == "/wake_up":
      self.asleep -= {tag.removeprefix("tags=") for tag in query.split("&")}
    return {"/reset_prefix_cache": {"success": self.resets}, "/weight_info": {"weight_version": self.version},
            "/is_sleeping": {"is_sleeping": bool(self.asleep)}}.get(path, {"results": [None]})


class _Handler(BaseHTTPRequestHandler):
  TROUBLES = ("500", "429", "400", "drop", "truncated", "not json", "no object", "few", "twice", "no tokens", "long",
              "aborted", "endless", "slow")
  fake: FakeVllm
  protocol_version = "HTTP/1.1"

  def setup(self) -> None:
    self.request.settimeout(30)
    self.fake.connections.add(self.request)
    super().setup()

  def finish(self) -> None:
    self.fake.connections.discard(self.request)
    super().finish()

  def log_message(self, *_: object) -> None:
    pass

  def do_GET(self) -> None:
    path, fake = urlparse(self.path).path, self.fake
    if path == "/health":
      self.answer({}, 200 if fake.healthy else 503)
    elif path == "/version":
      self.answer({"version": "0.0.fake"})
    elif path == "/v1/models":
      self.answer({"data": [{"id": "served", "root": fake.folder, "max_model_len": 256}]})
    elif path in ("/weight_info", "/is_sleeping") and fake.dev:
      self.answer(fake.act(path, {}))
    else:
      self.answer({"detail": "Not Found"}, 404)

  def do_POST(self) -> None:
    body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
    path, fake = urlparse(self.path).path, self.fake
    chosen = self.headers.get("X-data-parallel-rank")
    replica = int(chosen) if chosen and fake.replicas else None
    if path != "/v1/completions":
      answer = fake.act(path, body, urlparse(self.path).query) if fake.dev else {"detail": "Not Found"}
      self.answer(answer, 200 if fake.dev else 404)
    elif replica is not None and replica >= fake.replicas:
      self.answer({"error": {"message": f"data_parallel_rank {replica} is out of range [0, {fake.replicas})."}}, 400)
    elif "logprobs" in body:
      fake.probed.append(replica)
      tokens, logprobs = greedy(fake.folders.get(replica, fake.folder), tuple(body["prompt"]), body["max_tokens"])
      self.answer(_choices([{"index": 0, "token_ids": tokens, "finish_reason": "length",
                             "logprobs": {"token_logprobs": logprobs}}]))
    else:
      with fake.lock:
        number = len(fake.seen)
        fake.seen.append(body)
      self.complete(body, fake.trouble(number, body))

  def complete(self, body: dict, trouble: str) -> None:
    choices = []
    for j in range(body["n"]):
      tokens = self.fake.draw(body["prompt"], body["seed"] + j, body["temperature"], body["max_tokens"])
      choices.append({"index": j, "token_ids": tokens, "finish_reason": "stop" if tokens[-1] == END else "length"})
    first = choices[0]
    changed = {"few": choices[1:], "twice": [first, first, *choices[2:]],
               "no tokens": [{**c, "token_ids": None} for c in choices],
               "long": [{**c, "token_ids": [1] * (body["max_tokens"] + 1)} for c in choices],
               "aborted": [{**c, "finish_reason": "abort"} for c in choices]}.get(trouble, choices)
    answer = _choices(changed)
    if trouble == "drop":
      self.close_connection = True
    elif trouble in ("500", "429", "400"):
      self.answer({"error": {"message": "said no"}}, int(trouble))
    elif trouble in ("truncated", "not json", "no object"):
      whole = json.dumps(answer)
      self.answer("[]" if trouble == "no object" else whole[:40], length=len(whole) if trouble == "truncated" else None)
      self.close_connection = True
    elif trouble == "endless":
      self.answer("x" * 4_000_000)
    else:
      if trouble == "slow":
        time.sleep(2)
      with self.fake.lock:
        self.answer(answer)
        if trouble == "":
          self.fake.answered.append(body)

  def answer(self, value: object, status: int = 200, length: int | None = None) -> None:
    data = (value if isinstance(value, str) else json.dumps(value)).encode()
    try:
      self.send_response(status)
      self.send_header("Content-Length", str(length or len(data)))
      self.end_headers()
      self.wfile.write(data)
    except OSError:  # the client has gone
      self.close_connection = True


def _answer(folder: str, prompt: list[int], seed: int, temperature: float, most: int) -> list[int]:
  tokens, _ = greedy(folder, tuple(prompt), most)
  return tokens[:tokens.index(END) + 1] if END in tokens else tokens


def _choices(choices: list[dict]) -> dict:
  return {"choices": choices, "usage": {}}


def main() -> None:
  arguments = sys.argv[1:]
  if sleeps := "--enable-sleep-mode" in arguments:
    arguments.remove("--enable-sleep-mode")
  given = dict(zip(arguments[::2], arguments[1::2], strict=True))
  print("the fake server", {k: v for k, v in os.environ.items() if k.startswith(("XLA", "HF_", "PYTHON"))}, flush=True)
  what = given.get("--fake", "")
  if what == "dies":
    print("(Worker) ERROR [executor.py:1] ValueError: no GPU here", *["at once"] * 40, sep="\n")
    sys.exit("the worker failed")
  if what == "orphan":
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print("orphan", child.pid, flush=True)
  with FakeVllm(given["--model"], port=int(given["--port"])) as fake:
    fake.healthy = what != "never-healthy"
    fake.sleeps, fake.dev = sleeps and what != "sleepless", "VLLM_SERVER_DEV_MODE" in os.environ
    fake.stale = what == "stale"
    if what in ("greedy", "stale"):
      fake.draw = lambda *request: _answer(fake.folder, *request)
    time.sleep(600)


if __name__ == "__main__":
  main()
