"""Sampling of answers, and verdicts on them."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from imm_jax import files
from imm_jax.errors import UserError
from imm_jax.model import hf
from imm_jax.model.tokenization import encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.runs.run import Checkpoint, Run, Stage
from imm_jax.runtime import distributed
from imm_jax.sampling import Completion, Prompt, engines
from imm_jax.stages import questions
from imm_jax.stages.devices import make_mesh
from imm_jax.tasks import prompts, protocols
from imm_jax.tasks.base import Example
from imm_jax.tasks.judge import Judge

# Number of questions per task that are first checked before a run.
_NUM_CHECKED = 100
# `Sampler.generate` with a journal: (prompts, **options) -> completions, valid only on process 0.
Generate = Callable[..., list[list[Completion]]]


def build_stage(run: Run, model: Checkpoint, round_: int) -> Stage:
  """Builds the stage that samples in a round."""
  name = get_samples_name(round_)
  return Stage(name, (model.stage, "train questions"),
               _settings(run, round_), _plan(run.config, round_),
               lambda out, _: synthesize(run.config, model.folder, round_, run.scratch(name), out), everywhere=True,
               scratch=str(run.scratch(name)), costly=True, summarize=_summarize)


def build_shots_stage(run: Run) -> Stage:
  """Builds the stage that writes the worked examples of the prompts."""
  return Stage("few_shot.jsonl", ("train questions",), run.settings(*questions.list_round_keys(run.config)),
               f"the {run.config.prompt.few_shot} worked examples of the prompt",
               lambda out, _: write_shots(run.config, out))


def get_samples_name(round_: int) -> str:
  """Returns the name of a round's samples in the run directory."""
  return f"round_{round_}/samples.jsonl"


def get_temperatures(config: ml_collections.ConfigDict, round_: int) -> tuple[float, ...]:
  """Returns the temperatures that a round's samples use in turn.

  `sample.temperatures` is either one tuple for all rounds, or one per round, of which the last holds for later rounds.

  >>> config = ml_collections.ConfigDict({"sample": {"temperatures": ((0.2, 0.4), (0.8,))}})
  >>> [get_temperatures(config, t) for t in range(3)]
  [(0.2, 0.4), (0.8,), (0.8,)]
  """
  given = config.sample.temperatures
  return tuple(given[min(round_, len(given) - 1)]) if isinstance(given[0], tuple | list) else tuple(given)


def _settings(run: Run, round_: int) -> dict[str, Any]:
  """Returns the settings of a round's samples, with only this round's temperatures, so that others may change."""
  settings = run.settings(*questions.list_round_keys(run.config), "sample", "sampler")
  return settings | {"sample": settings["sample"] | {"temperatures": get_temperatures(run.config, round_)}}


def _plan(config: ml_collections.ConfigDict, round_: int) -> str:
  num_questions, given = config.task.questions_per_round, config.sample.temperatures
  per_round = isinstance(given[0], tuple | list)
  at = f" at temperatures {', '.join(f'{t:g}' for t in get_temperatures(config, round_))}" if per_round else ""
  if not num_questions:
    return f"{config.sample.num_samples} answers to every train question{at}"
  count = num_questions * config.sample.num_samples
  return (f"{num_questions} questions x {config.sample.num_samples} = {count} answers{at}, up to "
          f"{count * config.sample.max_new_tokens:,} tokens")


def _summarize(facts: dict[str, Any]) -> str:
  long = f", {facts['long_prompts']} questions skipped (too long)" if facts["long_prompts"] else ""
  return (f"{facts['correct']} of {facts['samples']} samples are right, {facts['unfinished']} were cut at "
          f"max_new_tokens, {facts['no_answer']} have no answer{long}")


def synthesize(config: ml_collections.ConfigDict, model: Path, round_: int, scratch: Path, out: Path,
               ) -> dict[str, Any]:
  """Samples answers to the round's questions, judges them, and writes samples.jsonl."""
  sample, temperatures = config.sample, get_temperatures(config, round_)
  chosen = questions.load_round(config, round_)
  examples, long = build_prompts(config, model, chosen.round_questions, limit="sample.max_new_tokens",
                                 source=f"task {config.task.name}, train", shots=chosen.shots)
  with open_sampler(config, model, sample.batch_size, scratch) as sampler:
    completions = sampler(
        [Prompt(f"round_{round_}/{e.id}", text) for e, text in examples], max_new_tokens=sample.max_new_tokens,
        num_samples=sample.num_samples, temperatures=temperatures, top_p=sample.top_p, stop=sample.stop,
        seed=config.seed, label=f"round {round_}: sample")
  if not distributed.is_main():
    return {}
  rows = judge_samples([e for e, _ in examples], completions, strict=True, temperatures=temperatures)
  files.write_jsonl(out, rows)
  return {"samples": len(rows), "correct": sum(r["correct"] for r in rows), "tokens": sum(r["tokens"] for r in rows),
          "unfinished": sum(r["finish"] == "length" for r in rows), "no_answer": sum(not r["span"] for r in rows),
          "long_prompts": long}


def write_shots(config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
  """Writes the worked examples of the prompts to few_shot.jsonl."""
  shots = questions.load_round(config, 0).shots
  files.write_jsonl(out, [{"id": e.id, "question": e.question, "response": e.rationale} for e in shots])
  return {"examples": len(shots)}


@contextlib.contextmanager
def open_sampler(config: ml_collections.ConfigDict, model: Path, batch_size: int, scratch: Path) -> Iterator[Generate]:
  """Opens a sampler of a model with the config's engine.

  Samples are journaled in the folder `scratch` by label, so that a killed run resumes.
  """
  with engines.open_sampler(config, model, batch_size=batch_size, scratch=scratch,
                            mesh=lambda: make_mesh(config)) as sampler:
    yield lambda requests, *, label, **options: sampler.generate(
        requests, label=label, journal=scratch / f"{re.sub(r'[^A-Za-z0-9]+', '_', label)}.jsonl", **options)


def build_prompts(config: ml_collections.ConfigDict, model: Path, examples: Sequence[Example], *, limit: str,
                  source: str, shots: Sequence[Example] = (), prompt: protocols.Prompt | None = None,
                  ) -> tuple[list[tuple[Example, str]], int]:
  """Builds prompts, and keeps those that fit in the model's context together with their answers.

  Args:
    config: run config.
    model: folder of the model, for its tokenizer and context length.
    examples: the questions.
    limit: config key of the maximum length of an answer, such as `eval.max_new_tokens`.
    source: description of the questions for error messages.
    shots: worked examples of the prompt.
    prompt: a protocol's function that builds prompts; by default that of the run's samples.

  Returns:
    The questions that fit with their prompts, and the number of others.

  Raises:
    UserError: when none fits.
  """
  shape = hf.read_config(model)
  tokenizer, positions = load_tokenizer(model, rows=shape.vocab_size), shape.max_positions
  sampled = limit.startswith("sample")
  max_new_tokens = config.sample.max_new_tokens if sampled else protocols.max_new_tokens(config)
  build = prompt or (lambda e, shots, tokenizer: prompts.build_prompt(
      e.question, header=config.prompt.header, examples=shots, style=config.prompt.style, tokenizer=tokenizer))
  built = [(e, build(e, shots, tokenizer)) for e in examples]
  if not positions:
    return built, 0
  ids = lambda text: encode_prompt(tokenizer, text, rows=shape.vocab_size)
  fit = [(e, text) for e, text in built if len(ids(text)) + max_new_tokens <= positions]
  if not fit:
    fewer = f" or config.{'prompt' if sampled else 'eval'}.few_shot" if shots else ""
    raise UserError(f"{source}: none of {len(built)} prompts leaves room for config.{limit}={max_new_tokens} in the "
                    f"{positions} positions of {model} (max_position_embeddings); lower config.{limit}{fewer}, or take "
                    "another task")
  return fit, len(built) - len(fit)


def check_prompts_fit(config: ml_collections.ConfigDict, base: Path, sampler: Path, draws: bool) -> None:
  """Raises UserError if a prompt cannot be built or no prompt of a task fits; called before a run.

  `sampler` is the model that samples for training, if the run `draws` samples.
  """
  tests = zip(questions.list_own_entries(config), questions.load_tests(config).values(), strict=True)
  checks = [(base, entry, examples, f"task {questions.get_task_name(entry)}") for entry, examples in tests]
  if config.merge.base_weight == "auto":
    checks += [(base, entry, questions.load_general_questions(config, entry), f"merge.auto.general {entry}")
               for entry in config.merge.auto.general]
  checks = [item for item in checks if questions.get_measure(config, item[1]) == "answer"]
  options = [(model, examples, {"limit": "eval.max_new_tokens", "source": source,
                                "shots": questions.load_shots(config, entry),
                                "prompt": protocols.get_protocol(config, questions.get_task_name(entry)).prompt})
             for model, entry, examples, source in checks]
  if draws:
    chosen = questions.load_round(config, 0)
    options.append((sampler, chosen.round_questions, {"limit": "sample.max_new_tokens", "shots": chosen.shots,
                                                      "source": f"task {config.task.name}, train"}))
  for model, examples, given in options:
    try:  # mostly a few questions suffice, which is quick
      build_prompts(config, model, examples[:_NUM_CHECKED], **given)
    except UserError:
      build_prompts(config, model, examples, **given)


def judge_samples(examples: Sequence[Example], completions: Sequence[Sequence[Completion]], *, strict: bool,
                  temperatures: Sequence[float] = (), read: Callable[[str, str], str] = lambda text, kind: text,
                  ) -> list[dict[str, Any]]:
  """Judges samples; returns a row for each.

  The verdict is on `read(text, kind)`; `temperatures` are those that the samples of a question used in turn.
  """
  drawn = [(example, s, completion) for example, group in zip(examples, completions, strict=True)
           for s, completion in enumerate(group)]
  with Judge() as judge:
    verdicts = judge.verdicts([(read(completion.text, e.kind), e.answer, e.kind) for e, _, completion in drawn],
                              strict=strict)
  return [{"id": e.id, **({"sample": s, "temperature": temperatures[s % len(temperatures)]} if temperatures else {}),
           "question": e.question, "gold": e.answer, "kind": e.kind, "text": completion.text,
           "tokens": completion.num_tokens, "finish": completion.finish, "correct": verdict.correct,
           "span": verdict.span}
          for (e, s, completion), verdict in zip(drawn, verdicts, strict=True)]
