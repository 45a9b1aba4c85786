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
from imm_jax.stages.devices import make_mesh
from imm_jax.stages.round_questions import count_round, list_round_keys, load_general, load_round
from imm_jax.stages.task_entries import Tasks, get_tasks
from imm_jax.stages.worked_examples import load_shots
from imm_jax.tasks import protocols
from imm_jax.tasks.base import Example
from imm_jax.tasks.judge import Judge

# Number of questions per task that are first checked before a run.
_NUM_CHECKED = 100
# `Sampler.generate` with a journal: (prompts, **options) -> completions, valid only on process 0.
Generate = Callable[..., list[list[Completion]]]


def build_stage(run: Run, model: Checkpoint, round_: int) -> Stage:
  """Builds the stage that samples in a round."""
  name, tasks = get_samples_name(round_), get_tasks(run.config)
  return Stage(name, (model.stage, "train questions"), _settings(run, tasks, round_),
               _plan(run.config, count_round(tasks), round_),
               lambda out, _: synthesize(run.config, model.folder, round_, run.scratch(name), out), everywhere=True,
               scratch=str(run.scratch(name)), costly=True, summarize=_summarize)


def build_shots_stage(run: Run) -> Stage:
  """Builds the stage that writes the worked examples of the prompts."""
  tasks = get_tasks(run.config)
  return Stage("few_shot.jsonl", ("train questions",), run.settings(*list_round_keys(tasks)),
               f"the {tasks.few_shot} worked examples of the prompt", lambda out, _: write_shots(tasks, out))


def get_samples_name(round_: int) -> str:
  """Returns the name of a round's samples in the run directory."""
  return f"round_{round_}/samples.jsonl"


def get_temperatures(given: Sequence[Any], round_: int) -> tuple[float, ...]:
  """Returns the temperatures that a round's samples use in turn.

  `given` is either one tuple for all rounds, or one per round, of which the last holds for later rounds.

  >>> [get_temperatures(((0.2, 0.4), (0.8,)), t) for t in range(3)]
  [(0.2, 0.4), (0.8,), (0.8,)]
  """
  return tuple(given[min(round_, len(given) - 1)]) if isinstance(given[0], tuple | list) else tuple(given)


def _settings(run: Run, tasks: Tasks, round_: int) -> dict[str, Any]:
  """Returns the settings of a round's samples, with only this round's temperatures, so that others may change."""
  settings = run.settings(*list_round_keys(tasks), "sample", "sampler")
  temperatures = get_temperatures(run.config.sample.temperatures, round_)
  return settings | {"sample": settings["sample"] | {"temperatures": temperatures}}


def _plan(config: ml_collections.ConfigDict, num_questions: int, round_: int) -> str:
  """Describes the samples of a round with this number of questions, 0 if it is not known."""
  sample, by = config.sample, f" by {config.teacher}" if config.teacher else ""
  given = sample.temperatures
  per_round = isinstance(given[0], tuple | list)
  at = f" at temperatures {', '.join(f'{t:g}' for t in get_temperatures(given, round_))}" if per_round else ""
  if not num_questions:
    return f"{sample.num_samples} answers to every train question{by}{at}"
  count, every = num_questions * sample.num_samples, "" if config.task.questions_per_round else "all "
  return (f"{every}{num_questions} questions x {sample.num_samples} = {count} answers{by}{at}, up to "
          f"{count * sample.max_new_tokens:,} tokens")


def _summarize(facts: dict[str, Any]) -> str:
  long = f", {facts['long_prompts']} questions skipped (too long)" if facts["long_prompts"] else ""
  return (f"{facts['correct']} of {facts['samples']} samples are right, {facts['unfinished']} were cut at "
          f"max_new_tokens, {facts['no_answer']} have no answer{long}")


def synthesize(config: ml_collections.ConfigDict, model: Path, round_: int, scratch: Path, out: Path,
               ) -> dict[str, Any]:
  """Samples answers to the round's questions, judges them, and writes samples.jsonl."""
  sample, tasks = config.sample, get_tasks(config)
  temperatures, chosen = get_temperatures(sample.temperatures, round_), load_round(tasks, round_)
  examples, long = build_prompts(
      model, chosen.round_questions, protocols.make_training_prompt(tasks.protocol),
      shots=chosen.shots, limit="sample.max_new_tokens", max_new_tokens=sample.max_new_tokens,
      source=f"task {tasks.in_domain.name}, train")
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


def write_shots(tasks: Tasks, out: Path) -> dict[str, Any]:
  """Writes the worked examples of the prompts to few_shot.jsonl."""
  shots = load_round(tasks, 0).shots
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


def build_prompts(model: Path, examples: Sequence[Example], build: protocols.Prompt, *, shots: Sequence[Example],
                  limit: str, max_new_tokens: int, source: str) -> tuple[list[tuple[Example, str]], int]:
  """Builds prompts, and keeps those that fit in the model's context together with their answers.

  Args:
    model: folder of the model, for its tokenizer and context length.
    examples: the questions.
    build: builds a prompt.
    shots: worked examples of the prompts.
    limit: config key of the maximum length of an answer, such as `eval.max_new_tokens`, for error messages.
    max_new_tokens: this length.
    source: description of the questions for error messages.

  Returns:
    The questions that fit with their prompts, and the number of others.

  Raises:
    UserError: when none fits.
  """
  shape = hf.read_config(model)
  tokenizer, positions = load_tokenizer(model, rows=shape.vocab_size), shape.max_positions
  built = [(e, build(e, shots, tokenizer)) for e in examples]
  if not positions:
    return built, 0
  ids = lambda text: encode_prompt(tokenizer, text, rows=shape.vocab_size)
  fit = [(e, text) for e, text in built if len(ids(text)) + max_new_tokens <= positions]
  if not fit:
    few_shot = "prompt.few_shot" if limit.startswith("sample") else "eval.few_shot"
    raise UserError(f"{source}: none of {len(built)} prompts leaves room for config.{limit}={max_new_tokens} in the "
                    f"{positions} positions of {model} (max_position_embeddings); lower config.{limit}"
                    f"{f' or config.{few_shot}' if shots else ''}, or take another task")
  return fit, len(built) - len(fit)


def check_prompts_fit(config: ml_collections.ConfigDict, base: Path, sampler: Path, draws: bool) -> None:
  """Raises UserError if a prompt cannot be built or no prompt of a task fits; called before a run.

  `sampler` is the model that samples for training, if the run `draws` samples.
  """
  tasks = get_tasks(config)
  asked = [(entry, examples, f"task {entry.name}")
           for entry, examples in zip(tasks.own, tasks.load_tests().values(), strict=True)]
  asked += [(entry, load_general(tasks, entry), f"merge.auto.general {text}")
            for entry, text in zip(tasks.general, config.merge.auto.general, strict=False)]
  checks: list[tuple[Path, Sequence[Example], protocols.Prompt, dict[str, Any]]] = [
      (base, examples, tasks.get_protocol(entry).prompt,
       {"shots": load_shots(tasks, entry), "limit": "eval.max_new_tokens",
        "max_new_tokens": tasks.protocol.token_limit, "source": source})
      for entry, examples, source in asked if entry.measure == "answer"]
  if draws:
    chosen = load_round(tasks, 0)
    checks.append((sampler, chosen.round_questions, protocols.make_training_prompt(tasks.protocol),
                   {"shots": chosen.shots, "limit": "sample.max_new_tokens",
                    "max_new_tokens": config.sample.max_new_tokens, "source": f"task {tasks.in_domain.name}, train"}))
  for model, examples, build, options in checks:
    try:  # mostly a few questions suffice, which is quick
      build_prompts(model, examples[:_NUM_CHECKED], build, **options)
    except UserError:
      build_prompts(model, examples, build, **options)


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
