"""Supervised fine-tuning of a round's model on its training data."""

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from imm_jax import files
from imm_jax.config_keys import load_defaults
from imm_jax.errors import UserError
from imm_jax.merging import on_disk
from imm_jax.methods import ANCHORS, get_anchor_weights, get_method, keeps_average
from imm_jax.model import attention, checkpoint_folder, hf, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params, abstract_params
from imm_jax.model.tokenization import encode_continuation, encode_prompt
from imm_jax.runs.metrics import StageMetrics
from imm_jax.runs.run import Checkpoint, Run, Stage
from imm_jax.runtime import distributed, hardware
from imm_jax.sampling import completions
from imm_jax.stages import devices
from imm_jax.stages.devices import make_mesh
from imm_jax.tasks import prompts
from imm_jax.tasks.base import Example
from imm_jax.training import interventions, lora, throughput, trainer
from imm_jax.training.additions import get_additions
from imm_jax.training.computation import Computation
from imm_jax.training.optimization import Optimization, make_schedule
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.reporting import Reporting
from imm_jax.training.states import Checkpoints
from imm_jax.training.step import Frozen

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_ROW_MULTIPLE = 128
_HELD_OUT = 0x51  # separates these draws from others of the same seed
# Folder of the weights' moving average within that of the tuned model.
AVERAGE = "ema"


def build_stage(run: Run, model: Checkpoint, train: str, round_: int) -> Stage:
  """Builds the stage that fine-tunes a model in a round, on the rows that the stage `train` writes."""
  method = run.method
  kind = {"method": {"anchor": method.anchor, "lora": method.lora}} if method.anchor or method.lora else {}
  return Stage(f"round_{round_}/sft", (model.stage, train, *[run.base.stage] * bool(method.anchor)),
               run.settings("seed", "prompt", "sft") | kind, _plan(run.config),
               functools.partial(devices.call, run.config, fine_tune, run.config, model.folder, run.base.folder,
                                 run.root / train, run.root, round_),
               everywhere=True, scratch=states_folder(run.config, run.root, round_), costly=True, summarize=_summarize)


def _summarize(facts: dict[str, Any]) -> str:
  if facts.get("skipped"):
    return "nothing to train on"
  long = f", {facts['dropped_long']} longer than a row left out" if facts["dropped_long"] else ""
  return (f"{facts['steps']} steps on {facts['examples']} answers{long}; loss {facts['first_loss']:.3f} to "
          f"{facts['last_loss']:.3f}")


def get_average(tuned: Checkpoint) -> Checkpoint:
  """Returns the moving average of a tuned model's weights over SFT."""
  return tuned._replace(folder=tuned.folder / AVERAGE)


def _plan(config: ml_collections.ConfigDict) -> str:
  sft, method = config.sft, get_method(config)
  extras = [f"{ANCHORS[name].summary} x {weight:g}" for name, weight in get_anchor_weights(config).items() if weight]
  extras += [f"LoRA of rank {sft.lora_rank}"] * method.lora
  extras += [f"average of decay {sft.ema_decay:g}"] * keeps_average(config)
  extras += [f"stopped on {sft.stop_share:.0%} of the questions"] * (sft.stop_share > 0)
  if sft.intervention != "none":
    extras.append(f"{sft.intervention} {sft[interventions.SETTINGS[sft.intervention]]:g}")
  if sft.grad_clip != load_defaults().sft.grad_clip and sft.intervention != "gradient_clipping":
    extras.append(f"gradients clipped at {sft.grad_clip:g}" if sft.grad_clip else "gradients not clipped")
  return ", ".join([f"{sft.epochs} epochs", f"{sft.global_batch} answers a step", *extras])


def fine_tune(config: ml_collections.ConfigDict, model: Path, base: Path, train: Path, root: Path, round_: int,
              out: Path, inputs: Mapping[str, str | None]) -> dict[str, Any]:
  """Fine-tunes a model on the selected answers, and writes an HF checkpoint in the model's own dtypes.

  Its subfolder `ema` gets a checkpoint of the weights' moving average, if one is kept, and with method lora `adapter`
  gets the adapters. `base` is the anchor of methods that have one. `inputs` are the digests of the inputs: training
  resumes from a saved state only if they are the same.
  """
  sft, name, rows = config.sft, f"round_{round_}", read_train(train)
  if not rows:  # data.skip_empty
    if distributed.is_main():
      for folder in (out, *[out / AVERAGE] * keeps_average(config)):
        copy(model, folder)
    return {"examples": 0, "steps": 0, "skipped": True}
  kept, held_out_indices = hold_out(rows, sft.stop_share, (config.seed, round_), source=train)
  examples = list(map(make_encoder(config, model), rows))
  data = pack(config, model, [examples[i] for i in kept], source=train, epochs=sft.epochs, seed=(config.seed, round_),
              lines=[i + 1 for i in kept])
  held_out_batches = pack(config, model, [examples[i] for i in held_out_indices], source=f"{train}, held out",
                          epochs=1, seed=config.seed, quiet=True).batches if held_out_indices else None
  batches, additions = data.batches, get_additions(config)
  schedule = make_schedule(sft.schedule, peak=sft.learning_rate, total_steps=len(batches),
                           warmup_ratio=sft.warmup_ratio)
  optimization = Optimization(schedule, sft.weight_decay, sft.grad_clip, _make_intervention(sft), additions)
  states = Checkpoints(states_folder(config, root, round_), save_interval=sft.save_interval,
                       max_to_keep=sft.max_to_keep, identity=dict(inputs))
  with states as checkpoints:
    saved = checkpoints.latest()  # raises for a state of another training before metrics are dropped
    from_step = saved["step"] if saved else 0
    with StageMetrics(root, f"{name}/sft", from_step=from_step, tracking=config.tracking) as metrics:
      load_initial = (lambda: lora.init(data.model, additions.lora, data.computation.mesh,
                                        key=_make_key(config, round_))) if additions.lora else (
          lambda: load_params(config, model))
      profile = throughput.Profile(config.profile, root / "profile" / name / f"process_{jax.process_index()}")
      trained = trainer.train(
          data.model, load_initial, batches, optimization, data.computation,
          Reporting(metrics.write, f"round {round_}: SFT", sft.log_every, data.lines, profile),
          load_frozen=lambda: _load_frozen(config, model, base), held_out=held_out_batches, checkpoints=checkpoints)
    for params, folder in ((trained.params, out), (trained.average, out / AVERAGE)):
      if params is not None and additions.lora:
        lora.save(params, additions.lora, folder, like=model)
      elif params is not None:
        hf.save(params, folder, like=model, keep_dtypes=sft.export == "model")
  facts = {"examples": len(data.lines), "dropped_long": data.dropped, "steps": trained.steps,
           "tokens": round(batches.tokens_per_step * trained.steps), "attention": data.computation.attention,
           "examples_per_step": round(batches.per_step, 2), "padding": round(batches.padding, 4),
           "first_loss": round(trained.first_loss, 6), "last_loss": round(trained.last_loss, 6)}
  if held_out_indices:
    facts |= {"held_out": len(held_out_indices), "held_out_losses": [round(loss, 6) for loss in trained.held_out],
              "best_epoch": trained.best_epoch}
  return facts


def copy(model: Path, out: Path) -> None:
  """Copies a checkpoint, for a round with nothing to train on."""
  on_disk.merge_folders("passthrough", {"models[0]": model}, {out: {}})
  checkpoint_folder.copy_side_files(model, out)


def hold_out(rows: Sequence[Mapping[str, Any]], share: float, seed: Any, *, source: Any) -> tuple[list[int], list[int]]:
  """Splits the rows of train.jsonl into those to train on and those held out, all answers to a share of the questions.

  Returns indices. At least one question is held out, and at least one is not; a share of 0 holds out nothing.

  Raises:
    UserError: when there is only one question.

  >>> rows = [{"question": q} for q in "aabbcd"]
  >>> train, held = hold_out(rows, 0.5, 0, source="train.jsonl")
  >>> sorted(train + held), {rows[i]["question"] for i in train} & {rows[i]["question"] for i in held}
  ([0, 1, 2, 3, 4, 5], set())
  """
  if not share:
    return list(range(len(rows))), []
  questions_ = list(dict.fromkeys(row["question"] for row in rows))
  if len(questions_) < 2:
    raise UserError(f"{source}: has answers to {len(questions_)} question; config.sft.stop_share={share:g} needs 2 or "
                    "more, one to train on and one to stop by")
  count = min(max(1, round(share * len(questions_))), len(questions_) - 1)
  drawn = np.random.default_rng([*np.atleast_1d(seed), _HELD_OUT]).permutation(len(questions_))[:count]
  chosen = {questions_[i] for i in drawn}
  return ([i for i, row in enumerate(rows) if row["question"] not in chosen],
          [i for i, row in enumerate(rows) if row["question"] in chosen])


def _load_frozen(config: ml_collections.ConfigDict, model: Path, base: Path) -> Frozen:
  """Loads the weights that the method's SFT uses but does not train."""
  method, compute = get_method(config), jnp.dtype(hardware.compute_dtype(config.sft.compute_dtype))
  frozen = {"base": load_params(config, model, compute)} if method.lora else {}
  if method.anchor:  # weights that compute are rounded to the compute dtype
    frozen["anchor"] = load_params(config, base, compute if ANCHORS[method.anchor].predicts else None)
  return frozen


def _make_key(config: ml_collections.ConfigDict, round_: int) -> jax.Array:
  """Returns the random key of a round's initial adapters."""
  return jax.random.fold_in(jax.random.key(config.seed), round_)


class Data(NamedTuple):
  """Holds packed training data: the model's config, batches, the lines of the examples in them, the number of dropped
  (too long) examples, and how passes over them are computed."""

  model: ModelConfig
  batches: PackedBatches
  lines: list[int]
  dropped: int
  computation: Computation


def pack(config: ml_collections.ConfigDict, model: Path, examples: Sequence[TokenizedExample], *, source: Any,
         epochs: int, seed: Any, row_length: int = 0, quiet: bool = False, lines: Sequence[int] | None = None) -> Data:
  """Packs examples for the run's devices, and prints notes on stderr unless `quiet`.

  Args:
    config: run config.
    model: folder of the model to train.
    examples: tokenized examples; those that do not fit in a row are dropped.
    source: source of the examples, for error messages.
    epochs: passes over the examples.
    seed: seed of their order.
    row_length: overrides `sft.row_length` unless 0.
    quiet: whether to print no notes.
    lines: line of each example; by default 1, 2, 3, ...

  Raises:
    UserError: when none fits in a row.
  """
  sft, mesh, length = config.sft, make_mesh(config), row_length or config.sft.row_length
  numbers = lines or range(1, len(examples) + 1)
  by_line = {line: e for line, e in zip(numbers, examples, strict=True) if len(e.prompt) + len(e.response) <= length}
  if not by_line:
    shortest = min((len(e.prompt) + len(e.response) for e in examples), default=0)
    raise UserError(f"{source}: none of its {len(examples)} answers fits with its prompt in config.sft.row_length="
                    f"{length} tokens; the shortest takes {shortest}")
  fitting = list(by_line.values())
  multiple = sharding.num_batch_shards(mesh) * sft.accumulation
  batches = PackedBatches(fitting, epochs=epochs, global_batch=sft.global_batch, row_length=length, seed=seed,
                          row_multiple=multiple)
  model_config, dtype = hf.read_config(model), jnp.dtype(hardware.compute_dtype(sft.compute_dtype))
  if distributed.is_main() and not quiet:
    longest = max(len(e.prompt) + len(e.response) for e in fitting)
    for note in _notes(config, model_config, mesh, batches, multiple, longest):
      print(f"note: {note}", file=sys.stderr)
  kernel = attention.choose_backend(sft.attention, model_config, dtype=dtype, length=length,
                                    rows=batches.rows // sft.accumulation, mesh=mesh)
  return Data(model_config, batches, list(by_line), len(examples) - len(by_line),
              Computation(mesh, dtype, sft.accumulation, sft.remat, kernel))


def choose_row_length(config: ml_collections.ConfigDict, examples: Iterable[TokenizedExample]) -> int:
  """Returns a row length that fits all examples: that of SFT, or a larger multiple of 128, which suits attention
  kernels and keeps shapes few."""
  longest = max(len(e.prompt) + len(e.response) for e in examples)
  return max(config.sft.row_length, -(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def load_params(config: ml_collections.ConfigDict, model: Path, dtype: jnp.dtype | None = jnp.float32) -> Params:
  """Loads a model's parameters, sharded as in SFT, in float32 or another dtype (None: the stored ones)."""
  return hf.load(model, dtype=dtype, place=functools.partial(sharding.param_sharding, make_mesh(config)))[1]


def _notes(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh, batches: PackedBatches, multiple: int,
           longest: int) -> Iterator[str]:
  sft = config.sft
  if batches.empty_rows:
    yield (f"{batches.empty_rows} of {batches.rows} rows of a step are empty, since {mesh.size} devices and "
           f"config.sft.accumulation={sft.accumulation} need a multiple of {multiple}; another mesh, or in a new run "
           "another config.sft.global_batch, fills them")
  whole = sharding.find_undivided(abstract_params(model), mesh)
  if whole:
    yield f"every device holds these whole, for config.mesh does not divide them: {', '.join(whole)}"
  if model.max_positions and longest > model.max_positions:
    yield (f"the longest answer has {longest} tokens with its prompt, the model's context {model.max_positions} "
           "(max_position_embeddings): the rest was never trained")


def _make_intervention(sft: ml_collections.ConfigDict) -> interventions.Intervention:
  if sft.intervention == "none":
    return interventions.Intervention()
  return interventions.INTERVENTIONS[sft.intervention](sft[interventions.SETTINGS[sft.intervention]])


def states_folder(config: ml_collections.ConfigDict, root: Path, round_: int) -> str:
  """Returns the folder of a round's training states, which holds nothing else and is removed once SFT is done."""
  if not config.sft.state_dir:
    return str(root / f"round_{round_}" / "sft_state")
  return f"{os.path.expanduser(config.sft.state_dir)}/round_{round_}_sft_state"


def make_encoder(config: ml_collections.ConfigDict, model: Path, *, shots: Sequence[Example] = (), ends: bool = True,
                 ) -> Callable[[Mapping[str, Any]], TokenizedExample]:
  """Returns a function that tokenizes a question and its response to the same ids as in sampling.

  Args:
    config: run config.
    model: folder of the model, for its tokenizer.
    shots: worked examples of the prompt.
    ends: whether the response includes the token that ends an answer.
  """
  rows, style = hf.read_config(model).vocab_size, config.prompt.style
  tokenizer, known = completions.load(model, rows)
  end = [_find_end_of_answer(tokenizer, known, style)] if ends else []

  def encode(row: Mapping[str, Any]) -> TokenizedExample:
    prompt = prompts.build_prompt(row["question"], header=config.prompt.header, examples=shots, style=style,
                                  tokenizer=tokenizer)
    return TokenizedExample(encode_prompt(tokenizer, prompt, rows=rows),
                            encode_continuation(tokenizer, row["response"], rows=rows) + end)

  return encode


def _find_end_of_answer(tokenizer: "PreTrainedTokenizerBase", known: Sequence[int], style: str) -> int:
  """Returns the token that ends an answer in training.

  In a chat it is the one with which the template ends an answer, if it is in `known`, the tokens that end samples;
  otherwise it is the tokenizer's end-of-text token.
  """
  if style == "chat":
    answer = "An answer."
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    try:
      _, match, ending = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)
    except Exception:  # templates may raise anything; one that rejects assistant turns is no error here
      match = ""
    if match:
      return next((i for i in encode_continuation(tokenizer, ending) if i in known), tokenizer.eos_token_id)
  return tokenizer.eos_token_id


def read_train(path: Path) -> list[dict[str, Any]]:
  """Reads the rows of train.jsonl."""
  return files.read_jsonl(path, {"question": str, "response": str})
