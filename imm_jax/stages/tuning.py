"""SFT of a round's model on its training data."""

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from imm_jax import cost, distributed, files, hardware, memory
from imm_jax.errors import UserError
from imm_jax.methods import draws
from imm_jax.metrics import StageMetrics
from imm_jax.model import attention, hf, sharding
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
from imm_jax.training import interventions, throughput, trainer
from imm_jax.training.checkpoints import Checkpoints
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.step import make_schedule

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# Questions whose lengths are counted before a run.
_LOOKED_AT = 100


def stage(run: Run, model: Model, train: str, round_: int) -> Stage:
  """The SFT of a round, from a model, on the rows that the stage `train` writes."""
  sft = run.config.sft
  return Stage(f"round_{round_}/sft", (model.stage, train), run.settings("seed", "prompt", "sft"),
               f"{sft.epochs} epochs, {sft.global_batch} answers a step",
               functools.partial(devices.call, run.config, fine_tune, run.config, model.folder, run.root / train,
                                 run.root, round_),
               everywhere=True, scratch=states_folder(run.config, run.root, round_), costly=True, said=_told)


def _told(facts: dict[str, Any]) -> str:
  long = f", {facts['dropped_long']} longer than a row left out" if facts["dropped_long"] else ""
  return (f"{facts['steps']} steps on {facts['examples']} answers{long}; loss {facts['first_loss']:.3f} to "
          f"{facts['last_loss']:.3f}")


def fine_tune(config: ml_collections.ConfigDict, model: Path, train: Path, root: Path, round_: int, out: Path,
              inputs: Mapping[str, str | None]) -> dict[str, Any]:
  """Fine-tunes the model on the kept answers: an HF checkpoint folder in the model's own dtype.

  `inputs` are the digests of what it reads: training goes on from a saved state of the same ones.
  """
  sft, name = config.sft, f"round_{round_}"
  data = pack(config, model, list(map(encoder(config, model), read_train(train))), what=train, epochs=sft.epochs,
              seed=(config.seed, round_))
  batches = data.batches
  schedule = make_schedule(sft.schedule, peak=sft.learning_rate, total_steps=len(batches),
                           warmup_ratio=sft.warmup_ratio)
  states = Checkpoints(states_folder(config, root, round_), save_interval=sft.save_interval,
                       max_to_keep=sft.max_to_keep, identity=dict(inputs))
  with states as checkpoints:
    saved = checkpoints.latest()  # refuses another training's before metrics are dropped
    with StageMetrics(root, f"{name}/sft", keep=saved["step"] if saved else 0) as metrics:
      trained = trainer.train(
          data.model, lambda: load_params(config, model), batches, schedule=schedule, weight_decay=sft.weight_decay,
          grad_clip=sft.grad_clip, intervention=_intervention(sft),
          log_every=sft.log_every, report=metrics.write, label=f"round {round_}: SFT", checkpoints=checkpoints,
          profile=throughput.Profile(config.profile, root / "profile" / name / f"process_{jax.process_index()}"),
          lines=data.lines, **data.options)
    hf.save(trained.params, out, like=model, keep_dtypes=True)
  return {"examples": len(data.lines), "dropped_long": data.dropped, "steps": len(batches),
          "tokens": round(batches.tokens_per_step * len(batches)), "attention": data.options["attention"],
          "examples_per_step": round(batches.per_step, 2), "padding": round(batches.padding, 4),
          "first_loss": round(trained.first_loss, 6), "last_loss": round(trained.last_loss, 6)}


class Data(NamedTuple):
  """What is trained on, and how: the model's config, packed batches, the lines of the examples in them, how many others
  are too long, and the options that training and gradients share."""

  model: ModelConfig
  batches: PackedBatches
  lines: list[int]
  dropped: int
  options: dict[str, Any]


def pack(config: ml_collections.ConfigDict, model: Path, examples: Sequence[TokenizedExample], *, what: Any,
         epochs: int, seed: Any, row_length: int = 0, quiet: bool = False) -> Data:
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

  Raises:
    UserError: when none fits in a row.
  """
  sft, mesh, length = config.sft, mesh_of(config), row_length or config.sft.row_length
  by_line = {line: e for line, e in enumerate(examples, 1) if len(e.prompt) + len(e.response) <= length}
  if not by_line:
    shortest = min((len(e.prompt) + len(e.response) for e in examples), default=0)
    raise UserError(f"{what}: none of its {len(examples)} answers fits with its prompt in config.sft.row_length="
                    f"{length} tokens; the shortest takes {shortest}")
  fitting = list(by_line.values())
  multiple = sharding.batch_parts(mesh) * sft.accumulation
  batches = PackedBatches(fitting, epochs=epochs, global_batch=sft.global_batch, row_length=length, seed=seed,
                          row_multiple=multiple)
  model_config, dtype = hf.read_config(model), jnp.dtype(hardware.compute_dtype(sft.compute_dtype))
  if distributed.is_main() and not quiet:
    longest = max(len(e.prompt) + len(e.response) for e in fitting)
    for note in _notes(config, model_config, mesh, batches, multiple, longest):
      print(f"note: {note}", file=sys.stderr)
  kernel = attention.choose(sft.attention, model_config, dtype=dtype, length=length,
                            rows=batches.rows // sft.accumulation, mesh=mesh)
  options = {"compute_dtype": dtype, "accumulation": sft.accumulation, "remat": sft.remat, "attention": kernel,
             "mesh": mesh}
  return Data(model_config, batches, list(by_line), len(examples) - len(by_line), options)


def load_params(config: ml_collections.ConfigDict, model: Path) -> Params:
  """The model's parameters in float32, where SFT has them."""
  return hf.load(model, dtype=jnp.float32, place=functools.partial(sharding.param_sharding, mesh_of(config)))[1]


def expect(config: ml_collections.ConfigDict, model: ModelConfig, folder: Path | None) -> memory.Expected:
  """What a round's training and sampling will probably run, before there are answers: told by the worked answers of the
  task, or where it has none or they are elsewhere (`folder` of the model too), by assumed lengths."""
  sft, mesh, count = config.sft, mesh_of(config), questions.counts(config)[0]
  assumed = round(cost.ASSUMED["question"] + cost.ASSUMED["length"] * config.sample.max_new_tokens)
  lengths, prompt = [assumed], 0
  if folder and not questions.is_remote(config, config.task.name):
    asked, encode = questions.of_round(config, 0), encoder(config, folder)
    worked = [encode({"question": e.question, "response": e.rationale})
              for e in asked.asked[:_LOOKED_AT] if e.rationale]
    lengths = [len(e.prompt) + len(e.response) for e in worked] or lengths
    asks = encoder(config, folder, shots=asked.shots if draws(config) else ())
    prompt = max(len(asks({"question": e.question, "response": ""}).prompt) for e in asked.asked[:_LOOKED_AT])
  if draws(config):
    count = round(count * config.sample.num_samples * cost.ASSUMED["right"] / max(1 - config.data.real_fraction, 0.5))
  drawn = itertools.islice(itertools.cycle(lengths), max(1, min(count, 1000)))
  lengths = [min(length, sft.row_length) for length in drawn]
  rows = PackedBatches([TokenizedExample([], [0] * length) for length in lengths], epochs=1, row_length=sft.row_length,
                       global_batch=sft.global_batch, seed=0,
                       row_multiple=sharding.batch_parts(mesh) * sft.accumulation).rows
  dtype = jnp.dtype(hardware.compute_dtype(sft.compute_dtype))
  kernel = attention.choose(sft.attention, model, dtype=dtype, length=sft.row_length, rows=rows // sft.accumulation,
                            mesh=mesh)
  return memory.Expected(rows, kernel, prompt)


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
  setting = {"gradient_decay": "gradient_decay", "gradient_clipping": "max_norm", "weight_masking": "top_share"}
  if sft.intervention == "none":
    return None
  return interventions.INTERVENTIONS[sft.intervention](sft[setting[sft.intervention]])


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
    prompt = prompts.build(row["question"], header=config.prompt.header, examples=shots, style=style,
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
