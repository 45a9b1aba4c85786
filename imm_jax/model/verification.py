"""Checks that a checkpoint is read as transformers reads it.

Logits are judged as a measuring instrument is, by the error against something more exact: transformers' own model with
every operation in float64. How far float32 may be from that depends on the model, since large activations, which
published models have at the first token, magnify rounding; so transformers' own float32 is measured beside.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imm_jax.errors import UserError
from imm_jax.model import hf
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import bind
from imm_jax.model.products import pairwise_sums
from imm_jax.model.tokenization import check_ids
from imm_jax.model.tokenizer import has_tokenizer, load_tokenizer
from imm_jax.model.tokenizer_check import check_tokenizer

# Text of the kinds that a tokenizer and a model meet: prose, sums, formulas, code, lists, other scripts.
TEXTS = (
    "On Monday morning the baker counted 144 rolls, and by noon she had sold three quarters of them. \"That leaves "
    "thirty-six,\" she told her son, \"and it's raining, so don't expect many more customers before two o'clock.\" He "
    "wrote the number on the slate, drew a line under it, and went back to his book about lighthouses.",
    "Question: A train covers 312.5 km in 2 hours and 30 minutes, then stops for 12 minutes. What was its average "
    "speed while it moved?\nAnswer: 2 hours and 30 minutes are 2.5 hours. 312.5 / 2.5 = 125, so it moved at 125 km/h. "
    "The stop doesn't count.\n#### 125\n\nTickets cost $7.50 (children: $3.25); 4 x 7.50 + 2 x 3.25 = 36.50, i.e. "
    "18% less than $44.51.",
    "Let $f(x) = x^2 - 5x + 6$. Since $f(x) = (x - 2)(x - 3)$, the roots are $x_1 = 2$ and $x_2 = 3$, and\n"
    "\\[ \\int_2^3 f(x)\\,dx = \\left[\\frac{x^3}{3} - \\frac{5x^2}{2} + 6x\\right]_2^3 = -\\frac{1}{6}. \\]\n"
    "Hence the answer is $\\boxed{-\\frac{1}{6}}$; note that |f(2.5)| = 1/4 ≤ 0.25 and √2 ≈ 1.41421, π ≠ 22/7.",
    "def longest_run(values: list[int]) -> int:\n    \"\"\"Length of the longest run of equal values.\"\"\"\n"
    "    best, run, last = 0, 0, None\n    for v in values:\n        run = run + 1 if v == last else 1\n"
    "        best, last = max(best, run), v\n\n    return best  # 0 for []\n\n\nfor (int i = 0; i < n; ++i) {\n\t"
    "sum += a[i] * b[i];   /* no overflow below 2^31 */\n}\n",
    "1. Wash the rice.\n2. Add 300 ml of water;\n   - cover it,\n   - wait 20 minutes!\n\n| fruit | price |\n|---|---:|"
    "\n| apples | 2.40 |\n\nSee https://example.org/a?b=1&c=%20 or write to nobody@example.org.  Two spaces,\ttab, END",
    "Der Müller fährt übermorgen nach Köln. L'été dernier, nous étions à la plage. ¿Dónde está el niño? Zażółć gęślą "
    "jaźń. Сегодня хорошая погода, правда? Καλημέρα σε όλους. 今天下午三点我们在图书馆见面。駅まで歩いて十分です。"
    "오늘은 날씨가 좋네요. صباح الخير يا أصدقاء. שלום לכולם. आज मौसम अच्छा है। สวัสดีครับ 😀👍🏽 e\u0301 ﬁ ½ № …",
)
# Our error may be so many times that of transformers in float32, and this much more: models that magnify nothing have
# both at 3e-7 to 3e-6 of the logits' scale, and which is larger is chance.
_TIMES, _FLOOR = 4, 1e-6
# Runs of transformers in float32, all but the first with what every module gives moved by a unit in its last place, as
# rounding might have: single tokens can be so ill conditioned that one run errs tenfold less than the next.
_RUNS = 4
_ROWS, _LENGTH = 2, 64
# The context where a config.json does not give it.
_CONTEXT = 4096


class LogitComparison(NamedTuple):
  """Compares logits of one kind of rows with those of transformers in float64.

  Attributes:
    kind: of the rows.
    error: largest difference between ours and float64, relative to the largest logit in float64.
    torch_error: the same of transformers' model in float32, the largest of _RUNS runs.
    kl: largest KL divergence of ours from float64 over the tokens, in nats.
    agreement: share of tokens with the same most likely successor.
    position: of the largest difference.
  """

  kind: str
  error: float
  torch_error: float
  kl: float
  agreement: float
  position: int

  @property
  def passes(self) -> bool:
    """Returns whether our error is of the size of transformers' own; not-a-number never is."""
    return self.error <= _TIMES * self.torch_error + _FLOOR


class _Rows(NamedTuple):
  """Holds tokens and their positions, both int32 [_ROWS, _LENGTH]."""

  kind: str
  tokens: np.ndarray
  positions: np.ndarray


def verify(source: Path) -> None:
  """Prints what the checks of a checkpoint folder found; raises UserError when one fails."""
  checked = hf.check_round_trip(source)
  print(f"{source}: {checked.count} tensors come back byte for byte")
  if checked.left_out:
    print(f"not written, since they follow from the rest: {', '.join(checked.left_out)}")
  if has_tokenizer(source):
    print(check_tokenizer(source, TEXTS, rows=hf.read_config(source).vocab_size))
  else:
    print("no tokenizer next to the weights, so none was checked")
  if importlib.util.find_spec("torch") is None:
    print("torch is not installed, so logits were not compared with transformers")
    return
  print("logits against transformers in float64, largest error relative to their scale:")
  comparisons = compare_logits(source)
  for c in comparisons:
    print(f"  {c.kind}: {c.error:.1e} (transformers in float32: up to {c.torch_error:.1e}), KL {c.kl:.1e} nats, "
          f"same most likely token {c.agreement:.2%}")
  print("this check cuts float32 sums into short parts; sampling and training do not, and on a CPU their logits err "
        "more (SmolLM2-135M: 1.1 to 8.5 times torch's error)")
  for c in comparisons:
    if not c.passes:
      raise UserError(
          f"{source}: the logits differ from transformers' by {c.error:.1e} of their scale ({c.kind}, position "
          f"{c.position}); expected at most {_TIMES} times the {c.torch_error:.1e} of its float32, and {_FLOOR:.0e}")


def compare_logits(source: Path) -> list[LogitComparison]:
  """Runs text and random tokens through our decoder in float32 and through transformers' in both; needs torch.

  The random tokens reach rows of the embedding that no text does. Of each kind some rows begin at position 0, others
  have ascending random positions over the whole context: an error in the rotary frequencies grows with the position.

  The models are in memory one after the other, in float32.

  Args:
    source: an HF folder; where it has no tokenizer there are random tokens only.
  """
  config = hf.read_config(source)
  kinds = _make_rows(source, config)
  ours = _run_ours(source, kinds)
  run_torch = _load_torch(source)
  return [_compare(rows, run_torch(rows, None), logits, [run_torch(rows, seed) for seed in range(_RUNS)])
          for rows, logits in zip(kinds, ours, strict=True)]


def _make_rows(source: Path, config: ModelConfig) -> list[_Rows]:
  """Makes rows of text, if there is a tokenizer, and of random tokens, from position 0 and over a long context."""
  rng = np.random.default_rng(0)
  shape, context = (2 * _ROWS, _LENGTH), max(_LENGTH, config.max_positions or _CONTEXT)
  tokens = {"random tokens": rng.integers(0, config.vocab_size, shape, np.int32)}
  if has_tokenizer(source):
    tokenizer = load_tokenizer(source, rows=config.vocab_size)
    ids = check_ids(tokenizer, tokenizer("\n\n".join(TEXTS))["input_ids"], config.vocab_size)
    starts = np.linspace(0, max(0, len(ids) - _LENGTH), len(tokens["random tokens"])).astype(int)  # over all texts
    text = np.resize(np.asarray(ids, np.int32), max(len(ids), _LENGTH))
    tokens = {"text": np.stack([text[start:start + _LENGTH] for start in starts]), **tokens}
  early = np.tile(np.arange(_LENGTH, dtype=np.int32), (_ROWS, 1))
  late = np.sort([rng.choice(context, _LENGTH, replace=False) for _ in range(_ROWS)]).astype(np.int32)
  return [rows for name, t in tokens.items() for rows in (
      _Rows(f"{name} from position 0", t[:_ROWS], early),
      _Rows(f"{name} over a context of {context}", t[_ROWS:], late))]


def _run_ours(source: Path, kinds: list[_Rows]) -> list[np.ndarray]:
  """Computes the logits of rows with our decoder in float32."""
  config, params = hf.load(source, dtype=jnp.float32, place=hf.place_on_host)
  run = jax.jit(lambda p, tokens, positions: bind(config, p)(
      tokens, positions=positions, segment_ids=jnp.ones_like(tokens), compute_dtype=jnp.float32))
  with pairwise_sums():  # the order of sums is XLA's, not the decoder's
    return [np.asarray(run(params, rows.tokens, rows.positions)) for rows in kinds]


def _load_torch(source: Path) -> Callable[[_Rows, int | None], np.ndarray]:
  """Loads transformers' model as a function from rows and a seed (None: float64) to logits."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
      source, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False).eval()

  class Float64(torch.overrides.TorchFunctionMode):
    """Turns casts to float32 into casts to float64: norms compute in float32 whatever they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
      if func is torch.Tensor.float:
        func = torch.Tensor.double
      swap = lambda x: torch.float64 if x is torch.float32 else x
      return func(*map(swap, args), **{name: swap(x) for name, x in (kwargs or {}).items()})

  def in_float64(module: torch.nn.Module, forward: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Runs a module in float64."""
    module.double()  # for the time of the call: in float64 a model of 7 billion parameters takes 56 GB
    with Float64():
      out = forward(*args)
    module.float()  # exact, as they were float32
    return out

  def perturb_output(module: torch.nn.Module, forward: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Runs a module and moves each output by at most one unit in the last place."""
    out = forward(*args)
    return torch.nextafter(out, out * torch.randint(0, 3, out.shape))  # towards zero, nowhere, or away from it

  # What has weights; rotary angles have none and stay float32, for that is how they are defined: late in a long context
  # their rounding turns heads by 0.01 radians.
  forwards = [(m, m.forward) for m in model.modules() if next(m.parameters(recurse=False), None) is not None]

  def run(rows: _Rows, seed: int | None) -> np.ndarray:
    for module, forward in forwards:
      wrap = in_float64 if seed is None else perturb_output if seed else None
      module.forward = functools.partial(wrap, module, forward) if wrap else forward
    ids = torch.from_numpy(rows.tokens).long()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
      torch.manual_seed(seed or 0)
      # Without a mask transformers takes a gap in the positions for the next text of a packed row.
      return model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.from_numpy(rows.positions).long(),
                   use_cache=False).logits.numpy()

  return run


def _compare(rows: _Rows, exact: np.ndarray, ours: np.ndarray, torch_singles: list[np.ndarray]) -> LogitComparison:
  scale, error = np.abs(exact).max(), np.abs(ours - exact).max(-1)
  torch_error = max(np.abs(logits - exact).max() for logits in torch_singles)
  with np.errstate(invalid="ignore"):  # what is not a number shows in the error
    kl = max(map(_kl, exact, ours.astype(np.float64)))
  return LogitComparison(rows.kind, float(error.max() / scale), float(torch_error / scale), float(kl),
                         float((ours.argmax(-1) == exact.argmax(-1)).mean()), int(rows.positions.flat[error.argmax()]))


def _kl(exact: np.ndarray, ours: np.ndarray) -> np.floating:
  """Returns the largest KL divergence of a row's tokens, of logits [_LENGTH, V]."""
  log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (exact, ours))
  return (np.exp(log_p) * (log_p - log_q)).sum(-1).max()
