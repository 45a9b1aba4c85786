"""SFT of a round's model on its training data."""

import functools
import itertools
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

from imm_jax import cost, distributed, files, hardware, memory
from imm_jax.errors import UserError
from imm_jax.merging import checkpoint
from imm_jax.methods import averages, draws, method_of
from imm_jax.metrics import StageMetrics
from imm_jax.model import attention, folder as checkpoint_folder, hf, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import Params
from imm_jax.model.tokenization import encode_continuation, encode_prompt
from imm_jax.run import Model, Run
from imm_jax.rundir import Stage
from imm_jax.sampling import completions
from imm_jax.stages import devices, questions
from imm_jax.stages.devices import mesh_of
from imm_jax.tasks import prompts
from imm_jax.tasks.base import Example
from imm_jax.training import interventions, lora, throughput, trainer
from imm_jax.training.additions import additions_of
from imm_jax.training.checkpoints import Checkpoints
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.step import Frozen, make_schedule

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# Questions whose lengths are counted before a run.
_LOOKED_AT = 100
_ROW = 128
_HELD_OUT = 0x51  # apart from what else is drawn of a seed
# The folder of the average of the weights, within the tuned model's.
AVERAGE = "ema"


def stage(run: Run, model: Model, train: str, round_: int) -> Stage:
  """The SFT of a round, from a model, on the rows that the stage `train` writes."""
  method = run.method
  kind = {"method": {"anchor": method.anchor, "lora": method.lora}} if method.anchor or method.lora else {}
  return Stage(f"round_{round_}/sft", (model.stage, train, *[run.base.stage] * bool(method.anchor)),
               run.settings("seed", "prompt", "sft") | kind, _plan(run.config),
               functools.partial(devices.call, run.config, fine_tune, run.config, model.folder, run.base.folder,
                                 run.root / train, run.root, round_),
               everywhere=True, scratch=states_folder(run.config, run.root, round_), costly=True, said=_told)


def _told(facts: dict[str, Any]) -> str:
  if facts.get("skipped"):
    return "nothing to train on"
  long = f", {facts['dropped_long']} longer than a row left out" if facts["dropped_long"] else ""
  return (f"{facts['steps']} steps on {facts['examples']} answers{long}; loss {facts['first_loss']:.3f} to "
          f"{facts['last_loss']:.3f}")


def average_of(tuned: Model) -> Model:
  """The average of a tuned model's weights over its SFT."""
  return tuned._replace(folder=tuned.folder / AVERAGE)


def _plan(config: ml_collections.ConfigDict) -> str:
  sft, method = config.sft, method_of(config)
  more = {"l2_sp": [f"L2 to the base x {sft.l2_sp_weight:g}"], "kl": [f"KL to the base x {sft.kl_weight:g}"]}.get(
      method.anchor, [])
  more += [f"LoRA of rank {sft.lora_rank}"] * method.lora + [f"average of decay {sft.ema_decay:g}"] * averages(config)
  more += [f"stopped on {sft.stop_share:.0%} of the questions"] * (sft.stop_share > 0)
  return ", ".join([f"{sft.epochs} epochs", f"{sft.global_batch} answers a step", *more])


def fine_tune(config: ml_collections.ConfigDict, model: Path, base: Path, train: Path, root: Path, round_: int,
              out: Path, inputs: Mapping[str, str | None]) -> dict[str, Any]:
  """Fine-tunes the model on the kept answers: an HF checkpoint folder in the model's own dtype; within it, in the
  folder `ema`, one of the average of the weights where that is kept, and with method lora the adapters in `adapter`.

  `base` is what the method's anchor is. `inputs` are the digests of what it reads: training goes on from a saved state
  of the same ones.
  """
  sft, name, rows = config.sft, f"round_{round_}", read_train(train)
  if not rows:  # data.skip_empty
    if distributed.is_main():
      for folder in (out, *[out / AVERAGE] * averages(config)):
        copy(model, folder)
    return {"examples": 0, "steps": 0, "skipped": True}
  seen, held = hold_out(rows, sft.stop_share, (config.seed, round_), what=train)
  examples = list(map(encoder(config, model), rows))
  data = pack(config, model, [examples[i] for i in seen], what=train, epochs=sft.epochs, seed=(config.seed, round_),
              lines=[i + 1 for i in seen])
  held_out = pack(config, model, [examples[i] for i in held], what=f"{train}, held out", epochs=1, seed=config.seed,
                  quiet=True).batches if held else None
  batches, additions, mesh = data.batches, additions_of(config), mesh_of(config)
  schedule = make_schedule(sft.schedule, peak=sft.learning_rate, total_steps=len(batches),
                           warmup_ratio=sft.warmup_ratio)
  states = Checkpoints(states_folder(config, root, round_), save_interval=sft.save_interval,
                       max_to_keep=sft.max_to_keep, identity=dict(inputs))
  with states as checkpoints:
    saved = checkpoints.latest()  # refuses another training's before metrics are dropped
    with StageMetrics(root, f"{name}/sft", keep=saved["step"] if saved else 0) as metrics:
      first = (lambda: lora.init(data.model, additions.lora, mesh, key=_key(config, round_))) if additions.lora else (
          lambda: load_params(config, model))
      trained = trainer.train(
          data.model, first, batches, schedule=schedule, weight_decay=sft.weight_decay,
          additions=additions, load_frozen=lambda: _frozen(config, model, base), held_out=held_out,
          grad_clip=sft.grad_clip, intervention=_intervention(sft),
          log_every=sft.log_every, report=metrics.write, label=f"round {round_}: SFT", checkpoints=checkpoints,
          profile=throughput.Profile(config.profile, root / "profile" / name / f"process_{jax.process_index()}"),
          lines=data.lines, **data.options)
    for params, folder in ((trained.params, out), (trained.average, out / AVERAGE)):
      if params is not None and additions.lora:
        lora.save(params, additions.lora, folder, like=model)
      elif params is not None:
        hf.save(params, folder, like=model, keep_dtypes=sft.export == "model")
  facts = {"examples": len(data.lines), "dropped_long": data.dropped, "steps": trained.steps,
           "tokens": round(batches.tokens_per_step * trained.steps), "attention": data.options["attention"],
           "examples_per_step": round(batches.per_step, 2), "padding": round(batches.padding, 4),
           "first_loss": round(trained.first_loss, 6), "last_loss": round(trained.last_loss, 6)}
  if held:
    losses = trained.held_out
    facts |= {"held_out": len(held), "held_out_losses": [round(loss, 6) for loss in losses],
              "best_epoch": 1 + losses.index(min(losses))}
  return facts


def copy(model: Path, out: Path) -> None:
  """Writes a checkpoint as it is, for a round in which there was nothing to train on."""
  checkpoint.merge_folders("passthrough", {"models[0]": model}, {out: {}})
  checkpoint_folder.copy_side_files(model, out)


def hold_out(rows: Sequence[Mapping[str, Any]], share: float, seed: Any, *, what: Any) -> tuple[list[int], list[int]]:
  """Which rows of train.jsonl are trained on, and which are held out: all answers to a share of the questions.

  At least one question is held out, and one is not.

  Raises:
    UserError: when there is but one question.

  >>> rows = [{"question": q} for q in "aabbcd"]
  >>> seen, held = hold_out(rows, 0.5, 0, what="train.jsonl")
  >>> sorted(seen + held), {rows[i]["question"] for i in seen} & {rows[i]["question"] for i in held}
  ([0, 1, 2, 3, 4, 5], set())
  """
  if not share:
    return list(range(len(rows))), []
  questions_ = list(dict.fromkeys(row["question"] for row in rows))
  if len(questions_) < 2:
    raise UserError(f"{what}: has answers to {len(questions_)} question; config.sft.stop_share={share:g} needs 2 or "
                    "more, one to train on and one to stop by")
  count = min(max(1, round(share * len(questions_))), len(questions_) - 1)
  drawn = np.random.default_rng([*np.atleast_1d(seed), _HELD_OUT]).permutation(len(questions_))[:count]
  chosen = {questions_[i] for i in drawn}
  return ([i for i, row in enumerate(rows) if row["question"] not in chosen],
          [i for i, row in enumerate(rows) if row["question"] in chosen])


def _frozen(config: ml_collections.ConfigDict, model: Path, base: Path) -> Frozen:
  """The weights that the method's SFT uses and does not train."""
  method, compute = method_of(config), jnp.dtype(hardware.compute_dtype(config.sft.compute_dtype))
  # L2 is to the base's weights as they are stored; what computes is rounded as it is for computing.
  anchor = {"anchor": load_params(config, base, None if method.anchor == "l2_sp" else compute)} if method.anchor else {}
  return anchor | ({"base": load_params(config, model, compute)} if method.lora else {})


def _key(config: ml_collections.ConfigDict, round_: int) -> jax.Array:
  """Of a round's first adapters."""
  return jax.random.fold_in(jax.random.key(config.seed), round_)


class Data(NamedTuple):
  """What is trained on, and how: the model's config, packed batches, the lines of the examples in them, how many others
  are too long, and the options that training and gradients share."""

  model: ModelConfig
  batches: PackedBatches
  lines: list[int]
  dropped: int
  options: dict[str, Any]


def pack(config: ml_collections.ConfigDict, model: Path, examples: Sequence[TokenizedExample], *, what: Any,
         epochs: int, seed: Any, row_length: int = 0, quiet: bool = False, lines: Sequence[int] | None = None) -> Data:
  """Packs examples for the run's devices; what a user should know of it is said on stderr, unless `quiet`.

  Args:
    config: of the run.
    model: whose they are.
    examples: by line; those that do not fit in a row are left out.
    what: where they come from, for the error.
    epochs: passes over them.
    seed: of their order.
    row_length: in place of `sft.row_length`.
    quiet: says nothing.
    lines: of the examples; by default they are counted, from 1.

  Raises:
    UserError: when none fits in a row.
  """
  sft, mesh, length = config.sft, mesh_of(config), row_length or config.sft.row_length
  numbers = lines or range(1, len(examples) + 1)
  by_line = {line: e for line, e in zip(numbers, examples, strict=True) if len(e.prompt) + len(e.response) <= length}
  if not by_line:
    shortest = min((len(e.prompt) + len(e.response) for e in examples), default=0)
    raise UserError(f"{what}: none of its {len(examples)} answers fits with its prompt in config.sft.row_length="
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
  options = {"compute_dtype": dtype, "accumulation": sft.accumulation, "remat": sft.remat, "attention": kernel,
             "mesh": mesh}
  return Data(model_config, batches, list(by_line), len(examples) - len(by_line), options)


def row_for(config: ml_collections.ConfigDict, examples: Iterable[TokenizedExample]) -> int:
  """The tokens of a row that holds each of these: SFT's, or where one is longer a multiple of 128, for few shapes that
  suit attention's kernels."""
  longest = max(len(e.prompt) + len(e.response) for e in examples)
  return max(config.sft.row_length, -(-longest // _ROW) * _ROW)


def load_params(config: ml_collections.ConfigDict, model: Path, dtype: jnp.dtype | None = jnp.float32) -> Params:
  """The model's parameters in float32, or another dtype (None: the stored ones), where SFT has them."""
  return hf.load(model, dtype=dtype, place=functools.partial(sharding.param_sharding, mesh_of(config)))[1]


def expect(config: ml_collections.ConfigDict, model: ModelConfig, folder: Path | None) -> memory.Expected:
  """What a round's training and sampling will probably run, before there are answers: told by the worked answers of the
  task, or where it has none or they are elsewhere (`folder` of the model too), by assumed lengths."""
  sft, mesh, count = config.sft, mesh_of(config), questions.counts(config)[0]
  assumed = round(cost.ASSUMED["question"] + cost.ASSUMED["length"] * config.sample.max_new_tokens)
  lengths, prompt, question, answer = [assumed], 0, 0.0, 0.0
  if folder and not questions.is_remote(config, config.task.name):
    asked, encode = questions.of_round(config, 0), encoder(config, folder)
    worked = [encode({"question": e.question, "response": e.rationale})
              for e in asked.asked[:_LOOKED_AT] if e.rationale]
    lengths = [len(e.prompt) + len(e.response) for e in worked] or lengths
    asks = encoder(config, folder, shots=asked.shots if draws(config) else ())
    bare = [{"question": e.question, "response": ""} for e in asked.asked[:_LOOKED_AT]]
    prompt = max(len(asks(row).prompt) for row in bare)
    question = float(np.mean([len(encode(row).prompt) for row in bare]))
    answer = float(np.mean([len(e.response) for e in worked])) if worked else 0.0
  if draws(config):
    count = round(count * config.sample.num_samples * cost.ASSUMED["right"] / max(1 - config.data.real_fraction, 0.5))
  drawn = itertools.islice(itertools.cycle(lengths), max(1, min(count, 1000)))
  lengths = [min(length, sft.row_length) for length in drawn]
  rows = PackedBatches([TokenizedExample([], [0] * length) for length in lengths], epochs=1, row_length=sft.row_length,
                       global_batch=sft.global_batch, seed=0,
                       row_multiple=sharding.num_batch_shards(mesh) * sft.accumulation).rows
  dtype = jnp.dtype(hardware.compute_dtype(sft.compute_dtype))
  kernel = attention.choose_backend(sft.attention, model, dtype=dtype, length=sft.row_length,
                                    rows=rows // sft.accumulation, mesh=mesh)
  return memory.Expected(rows, kernel, prompt, question, answer)


def _notes(config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh, batches: PackedBatches, multiple: int,
           longest: int) -> Iterator[str]:
  sft = config.sft
  if batches.empty_rows:
    yield (f"{batches.empty_rows} of {batches.rows} rows of a step are empty, since {mesh.size} devices and "
           f"config.sft.accumulation={sft.accumulation} need a multiple of {multiple}; another mesh, or in a new run "
           "another config.sft.global_batch, fills them")
  whole = memory.undivided(model, mesh)
  if whole:
    yield f"every device holds these whole, for config.mesh does not divide them: {', '.join(whole)}"
  if model.max_positions and longest > model.max_positions:
    yield (f"the longest answer has {longest} tokens with its prompt, the model's context {model.max_positions} "
           "(max_position_embeddings): the rest was never trained")


def _intervention(sft: ml_collections.ConfigDict) -> interventions.Intervention | None:
  if sft.intervention == "none":
    return None
  return interventions.INTERVENTIONS[sft.intervention](sft[interventions.SETTINGS[sft.intervention]])


def states_folder(config: ml_collections.ConfigDict, root: Path, round_: int) -> str:
  """Where the training states of a round are, until it is done: a folder that holds nothing else."""
  if not config.sft.state_dir:
    return str(root / f"round_{round_}" / "sft_state")
  return f"{os.path.expanduser(config.sft.state_dir)}/round_{round_}_sft_state"


def encoder(config: ml_collections.ConfigDict, model: Path, *, shots: Sequence[Example] = (), ends: bool = True,
            ) -> Callable[[Mapping[str, Any]], TokenizedExample]:
  """A function that encodes a question and its response, to the ids that a sampler read and gave.

  Args:
    config: of the run.
    model: whose tokenizer counts.
    shots: worked examples of the prompt.
    ends: whether the token that ends an answer belongs to the response.
  """
  rows, style = hf.read_config(model).vocab_size, config.prompt.style
  tokenizer, known = completions.load(model, rows)
  end = [_end_of_answer(tokenizer, known, style)] if ends else []

  def encode(row: Mapping[str, Any]) -> TokenizedExample:
    prompt = prompts.build_prompt(row["question"], header=config.prompt.header, examples=shots, style=style,
                                  tokenizer=tokenizer)
    return TokenizedExample(encode_prompt(tokenizer, prompt, rows=rows),
                            encode_continuation(tokenizer, row["response"], rows=rows) + end)

  return encode


def _end_of_answer(tokenizer: "PreTrainedTokenizerBase", known: Sequence[int], style: str) -> int:
  """The token that ends an answer in training: in a chat the one with which its template ends an answer, where samples
  end on it too (they are `known`), else the tokenizer's own."""
  if style == "chat":
    answer = "An answer."
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    try:
      _, found, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)
    except Exception:  # a template raises what it likes; one that takes no answer is no error here
      found = ""
    if found:
      return next((i for i in encode_continuation(tokenizer, after) if i in known), tokenizer.eos_token_id)
  return tokenizer.eos_token_id


def read_train(path: Path) -> list[dict[str, Any]]:
  """The rows of train.jsonl."""
  return files.read_jsonl(path, {"question": str, "response": str})
