"""A sampler that uses vLLM servers."""

import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.model import checkpoint_folder, hf
from imm_jax.model.tokenization import known_ids
from imm_jax.runtime import progress
from imm_jax.sampling import Completion, Prompt, completions
from imm_jax.sampling.journal import Journal
from imm_jax.sampling.vllm import freshness, remote, server as vllm_server, sleeping
from imm_jax.sampling.vllm.client import NEUTRAL, Generated, Server, ServerError
from imm_jax.sampling.vllm.dispatch import Dispatcher, no_server_message

# The samples of a prompt at a temperature have consecutive seeds; blocks of seeds are this far apart.
_SEED_STEP = 1 << 12
# URL -> checkpoint that this process last made a remote server load.
_last_loaded: dict[str, Path] = {}


class VllmSampler:
  """Samples from an HF checkpoint folder with vLLM; use as a context manager.

  It either starts a local server (`python`), or makes remote servers (`urls`) reload their weights from the folder. A
  local server needs the memory of the GPUs, so that JAX must not have used them in this process
  (`jax.config.update("jax_platforms", "cpu")`).
  """

  def __init__(self, folder: str | Path, *, python: str = "", urls: Sequence[str] = (), args: Sequence[str] = (),
               restart: str = "", compute_dtype: str = "bfloat16", concurrency: int = 256, timeout: float = 1800.0,
               start_timeout: float = 1800.0, tolerance: float = 0.0, log: str | Path | None = "vllm.log",
               mesh: Mesh | None = None, start: bool = True, sleep: bool = False):
    """Starts a local server, or makes remote servers reload; blocks until they are ready.

    Args:
      folder: HF checkpoint folder with a tokenizer; remote servers must see it under the same path.
      python: interpreter of an environment with vLLM, for a local server. Exactly one of `python` and `urls` is needed.
      urls: URLs of remote servers.
      args: more arguments for the local server, such as `--gpu-memory-utilization=0.8`.
      restart: command that restarts the remote servers instead of a reload; `{model}` in it is replaced by the folder.
      compute_dtype: dtype of weights and activations: bfloat16, float16 or float32.
      concurrency: maximum number of concurrent requests at each server, 1 or more.
      timeout: seconds that a request may take.
      start_timeout: seconds that a server may take to start or reload.
      tolerance: allowed mean difference of the servers' log-probabilities from the native decoder's; 0 takes that of
        `compute_dtype` (`freshness.TOLERANCES`).
      log: file for the output of a local server; None for one that goes with the server unless an error has named it.
      mesh: this process's own devices, for the check of the servers' weights; None takes the CPU.
      start: False defers the start to the first call of `generate` that needs a server.
      sleep: leaves a local server asleep at the end, without weights and cache, for the next sampler of this process
        with the same arguments and a model of the same shape, which then takes no start. It ends with this process.

    Raises:
      ValueError: for an unknown dtype, or both or none of `python` and `urls`.
      UserError: for a checkpoint or tokenizer that cannot be read, or when no server is usable.
    """
    if compute_dtype not in freshness.TOLERANCES:
      raise ValueError(f"compute_dtype={compute_dtype!r}: expected one of {', '.join(freshness.TOLERANCES)}")
    if bool(python) == bool(urls):
      raise ValueError(f"python={python!r}, urls={urls}: expected one of the two")
    self._tolerance = tolerance
    self._folder, self._dtype, self._concurrency, self._mesh = Path(folder), compute_dtype, concurrency, mesh
    config = hf.read_config(folder)
    self.tokenizer, self._eos = completions.load(self._folder, config.vocab_size)
    self._unknown = frozenset(range(config.vocab_size)).difference(known_ids(self.tokenizer, config.vocab_size))
    self._vocab_size = config.vocab_size
    self._checked = False
    self._earlier: dict[Server, Path] = {}
    # What remote servers say of their weights: the version that a reload has set, or the folder they started with.
    self._identify = remote.served_folder if restart else Server.weights
    self._expected: dict[Server, str] = {}
    self._digest = checkpoint_folder.digest(self._folder)
    self._servers: list[Server] = []
    self._failed: dict[Server, str] = {}  # servers that were taken out, and why
    self._local = (python, tuple(args), compute_dtype, concurrency, config) if sleep and python else None
    self._start = functools.partial(self._begin, python, urls, args, restart, timeout, start_timeout,
                                    log and Path(log))
    if start:
      self._begin_once()

  def _begin_once(self) -> None:
    begin, self._start = self._start, None
    if begin:
      try:
        begin()
      except BaseException:
        self.close()
        raise

  def _begin(self, python: str, urls: Sequence[str], args: Sequence[str], restart: str, timeout: float,
             start_timeout: float, log: Path | None) -> None:
    """Starts or reloads the servers; see `__init__`."""
    if python:
      if woken := sleeping.wake(self._local, self._folder, self._digest, timeout=start_timeout):
        self._servers, self._earlier = [woken[0]], dict([woken])
        return
      self._servers = [vllm_server.start(
          python, self._folder, dtype=self._dtype, args=args, log=log, connections=self._concurrency, timeout=timeout,
          sleeps=self._local is not None, start_timeout=start_timeout)]
      return
    self._servers = [Server(url, connections=self._concurrency, timeout=timeout) for url in urls]
    if restart:
      remote.restart(restart, self._folder, start_timeout)
      self._prepare(lambda server: remote.wait_for(server, start_timeout))
    else:
      self._prepare(lambda server: self._reload(server, start_timeout))
      self._earlier = {server: _last_loaded[server.url] for server in self._usable() if server.url in _last_loaded}
      _last_loaded.update((server.url, self._folder.resolve()) for server in self._usable())

  def __enter__(self) -> "VllmSampler":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes connections, and ends a local server or puts it to sleep."""
    for server in self._servers:
      if not (self._local and self._checked and server not in self._failed
              and sleeping.put_to_sleep(self._local, server, self._folder)):
        server.close()
    self._servers = []

  def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, num_samples: int = 1,
               temperatures: Sequence[float] = (0.0,), top_p: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
               label: str = "sample", journal: Path | None = None) -> list[list[Completion]]:
    """Samples `num_samples` completions of every prompt, see `Sampler.generate`.

    Prompts and completions are exchanged as token ids of the checkpoint's tokenizer, so that nothing depends on vLLM's
    tokenizer, template or detokenizer. The random draws are vLLM's: they differ from the native sampler's, but are also
    determined by (seed, prompt id, sample number).

    Raises:
      ValueError: for an empty prompt, or an argument out of range.
      UserError: for a prompt with a token id outside of the embedding; when a server runs other weights (before the
        first samples) or rejects a prompt, such as one that exceeds its context; when no server is left.
    """
    completions.check_arguments(max_new_tokens, num_samples, temperatures, top_p, stop, seed)
    ids = completions.encode(self.tokenizer, prompts, self._vocab_size)
    ends, stop_texts = completions.endings(self.tokenizer, self._eos, stop, self._vocab_size)
    requests = _requests(prompts, ids, num_samples, temperatures, seed)
    results: list[list[Completion | None]] = [[None] * num_samples for _ in prompts]

    def put(request: _Request, done: list[Completion]) -> None:
      for number, completion in zip(range(request.first, num_samples, len(temperatures)), done, strict=True):
        results[request.prompt][number] = completion

    settings = {"max_new_tokens": max_new_tokens, "num_samples": num_samples, "temperatures": list(temperatures),
                "top_p": top_p, "stop": list(stop), "seed": seed, "dtype": self._dtype}
    options = {"top_p": top_p, "stop": list(stop_texts), "stop_token_ids": list(ends)}
    ask = lambda server, request: self._ask(server, request, max_new_tokens, options)
    with contextlib.ExitStack() as stack:
      file = Journal(journal, self._header(settings, prompts)) if journal else None
      if file:
        stack.enter_context(contextlib.closing(file))
      earlier = {i: done for i, done in file.done.items()
                 if 0 <= i < len(requests) and len(done) == requests[i].count} if file else {}
      for i, done in earlier.items():
        put(requests[i], done)
      remaining = [(i, request) for i, request in enumerate(requests) if i not in earlier]
      if remaining:
        self._begin_once()
        if not self._usable():
          raise UserError(no_server_message(self._failed))
      self._check_versions(journal)
      if remaining and not self._checked:
        self._check(list({request.prompt: request.ids for _, request in remaining}.values()), max_new_tokens)
      dispatcher = Dispatcher(self._usable(), lambda server, item: ask(server, item[1]), remaining,
                              concurrency=self._concurrency)
      stack.callback(lambda: self._failed.update(dispatcher.out))
      bar = stack.enter_context(progress.make_bar(len(prompts) * num_samples, label, "sample", initial=sum(
          map(len, earlier.values()))))
      tokens = sum(c.num_tokens for done in earlier.values() for c in done)
      for (i, request), generated in stack.enter_context(contextlib.closing(iter(dispatcher))):
        done = self._complete(generated, ends, stop_texts) * (request.count // len(generated))
        if file:
          file.add(i, done)
        put(request, done)
        tokens += sum(c.num_tokens for c in done)
        bar.update(len(done))
        bar.set_postfix(tokens=tokens, refresh=False)
      self._check_versions(journal)
    return results

  def _complete(self, generated: Sequence[Generated], ends: tuple[int, ...], stop: tuple[str, ...]) -> list[Completion]:
    """Converts a server's answer to completions."""
    done = [completions.completion(self.tokenizer, np.array(g.tokens), ends, stop) for g in generated]
    # The server may have ended a sample for a reason that only it knows.
    return [c._replace(finish=g.finish) if g.finish == "stop" else c for c, g in zip(done, generated, strict=True)]

  def _ask(self, server: Server, request: "_Request", max_new_tokens: int, options: dict[str, Any]) -> list[Generated]:
    greedy = request.temperature == 0
    ask = lambda **more: server.complete(
        request.ids, n=1 if greedy else request.count, max_tokens=max_new_tokens, temperature=request.temperature,
        seed=request.seed, **NEUTRAL, **options, **more)
    generated = ask()
    if self._unknown and any(self._unknown.intersection(g.tokens) for g in generated):
      # Embedding rows without a token are hardly ever drawn, so a bias is sent only then: in all requests it is costly.
      generated = ask(logit_bias={str(i): -100.0 for i in sorted(self._unknown)})
    if any(t >= self._vocab_size or t in self._unknown for g in generated for t in g.tokens):
      raise ServerError("its answer has token ids that the tokenizer does not have")
    return generated

  def _check(self, ids: Sequence[list[int]], new_tokens: int) -> None:
    """Checks the servers' weights, once, with some of the prompts to be sampled."""
    step = -(-len(ids) // freshness.PROMPTS)
    results = freshness.check_weights(self._usable(), self._folder, ids[::step], dtype=self._dtype,
                                      new_tokens=new_tokens,
                                      tolerance=self._tolerance, mesh=self._mesh, earlier=self._earlier)
    self._take_out({server: str(e) for server, e in results.items() if isinstance(e, ServerError)})
    self._checked = True

  def _reload(self, server: Server, timeout: float) -> str:
    """Makes a remote server load the weights; returns their version, raises ServerError for another architecture."""
    served = Path(remote.served_folder(server))
    if (served / "config.json").is_file() and hf.read_config(served) != hf.read_config(self._folder):
      raise ServerError(f"it serves {served}, a model of another shape than {self._folder}; start it with that one")
    server.reload(str(self._folder.resolve()), self._digest, timeout=timeout)
    return self._digest

  def _check_versions(self, journal: Path | None) -> None:
    """Raises UserError and deletes the journal if a remote server's weights have changed meanwhile."""
    for server in self._usable():
      expected = self._expected.get(server)
      try:
        if expected is None or (current := self._identify(server)) == expected:
          continue
      except ServerError:
        continue  # the next request will report it
      if journal:
        journal.unlink(missing_ok=True)
      raise UserError(f"{server}: was given other weights ({current!r:.99}, and not {expected!r:.99}) or was started "
                      "again while it was used here. Let no other run use it, and give the same command again")

  def _prepare(self, prepare: Callable[[Server], str]) -> None:
    """Prepares all servers in parallel, keeps the usable ones, and what `_identify` must return for them from then on.
    """

    def attempt(server: Server) -> str:
      try:
        self._expected[server] = prepare(server)
      except ServerError as e:
        return str(e)
      return ""

    with ThreadPoolExecutor(len(self._servers)) as pool:
      failed = zip(self._servers, pool.map(attempt, self._servers), strict=True)
      self._take_out({server: reason for server, reason in failed if reason})

  def _take_out(self, failed: dict[Server, str]) -> None:
    """Takes out servers that failed; raises UserError when none is left."""
    self._failed |= failed
    if not self._usable():
      raise UserError(no_server_message(self._failed))
    for server, reason in failed.items():
      print(f"warning: server {server} is not used in this round ({reason})", file=sys.stderr)

  def _usable(self) -> list[Server]:
    return [server for server in self._servers if server not in self._failed]

  def _header(self, settings: dict[str, Any], prompts: Sequence[Prompt]) -> dict[str, Any]:
    questions = files.digest_json([tuple(p) for p in prompts])
    return {"journal": 1, "model": self._digest, "questions": questions, **settings}


class _Request(NamedTuple):
  """Asks for the samples of a prompt at one temperature: numbers `first`, `first + len(temperatures)`, ..."""

  prompt: int
  first: int
  ids: list[int]
  temperature: float
  count: int
  seed: int


def _requests(prompts: Sequence[Prompt], ids: Sequence[list[int]], num_samples: int, temperatures: Sequence[float],
              seed: int) -> list[_Request]:
  """Creates a request per prompt and temperature; vLLM draws sample j of a request with seed `seed + j`."""
  if -(-num_samples // len(temperatures)) > _SEED_STEP:
    raise ValueError(f"num_samples={num_samples}: expected at most {_SEED_STEP} for each temperature")
  result, used_blocks = [], set()
  for p, prompt in enumerate(prompts):
    for first, temperature in enumerate(temperatures[:num_samples]):
      hashed = hashlib.sha256(f"{seed}/{first}/{prompt.id}".encode()).digest()
      block = int.from_bytes(hashed[:6])
      while block in used_blocks:  # a hash collision, or two prompts with the same id
        block = (block + 1) % (1 << 48)
      used_blocks.add(block)
      count = len(range(first, num_samples, len(temperatures)))
      result.append(_Request(p, first, ids[p], temperature, count, block * _SEED_STEP))
  return result
