"""Sampled answers with verdicts."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from imm_jax import distributed, files
from imm_jax.errors import UserError
from imm_jax.model import hf
from imm_jax.model.tokenization import encode_prompt
from imm_jax.model.tokenizer import load_tokenizer
from imm_jax.run import Model, Run
from imm_jax.rundir import Stage
from imm_jax.sampling import Completion, Prompt, engines
from imm_jax.stages import questions
from imm_jax.stages.devices import mesh_of
from imm_jax.tasks import prompts, protocols
from imm_jax.tasks.base import Example
from imm_jax.tasks.judge import Judge

# Questions of a task that are looked at before a run.
_LOOKED_AT = 100
# `Sampler.generate` with a journal: (prompts, options) -> completions, which count on process 0 alone.
Generate = Callable[..., list[list[Completion]]]
check_sampler = engines.check


def stage(run: Run, model: Model, round_: int) -> Stage:
  """The samples of a round."""
  name = samples_of(round_)
  return Stage(name, (model.stage, "train questions"),
               _settings(run, round_), _plan(run.config, round_),
               lambda out, _: synthesize(run.config, model.folder, round_, run.scratch(name), out), everywhere=True,
               scratch=str(run.scratch(name)), costly=True, said=_told)


def shots_stage(run: Run) -> Stage:
  """The worked examples of the prompts."""
  return Stage("few_shot.jsonl", ("train questions",), run.settings(*questions.settings_of_round(run.config)),
               f"the {run.config.prompt.few_shot} worked examples of the prompt",
               lambda out, _: write_shots(run.config, out))


def samples_of(round_: int) -> str:
  """The name of a round's samples in the run directory."""
  return f"round_{round_}/samples.jsonl"


def temperatures_of(config: ml_collections.ConfigDict, round_: int) -> tuple[float, ...]:
  """The temperatures of a round's samples in turn: all there are, or where each round has its own those of this round,
  the last of them for rounds that have none.

  >>> config = ml_collections.ConfigDict({"sample": {"temperatures": ((0.2, 0.4), (0.8,))}})
  >>> [temperatures_of(config, t) for t in range(3)]
  [(0.2, 0.4), (0.8,), (0.8,)]
  """
  given = config.sample.temperatures
  return tuple(given[min(round_, len(given) - 1)]) if isinstance(given[0], tuple | list) else tuple(given)


def _settings(run: Run, round_: int) -> dict[str, Any]:
  """Of the temperatures only the round's own, so that other rounds' change nothing."""
  found = run.settings(*questions.settings_of_round(run.config), "sample", "sampler")
  return found | {"sample": found["sample"] | {"temperatures": temperatures_of(run.config, round_)}}


def _plan(config: ml_collections.ConfigDict, round_: int) -> str:
  asked, given = config.task.questions_per_round, config.sample.temperatures
  own = isinstance(given[0], tuple | list)
  at = f" at temperatures {', '.join(f'{t:g}' for t in temperatures_of(config, round_))}" if own else ""
  if not asked:
    return f"{config.sample.num_samples} answers to every train question{at}"
  count = asked * config.sample.num_samples
  return (f"{asked} questions x {config.sample.num_samples} = {count} answers{at}, up to "
          f"{count * config.sample.max_new_tokens:,} tokens")


def _told(facts: dict[str, Any]) -> str:
  long = f", {facts['long_prompts']} questions skipped (too long)" if facts["long_prompts"] else ""
  return (f"{facts['correct']} of {facts['samples']} samples are right, {facts['unfinished']} were cut at "
          f"max_new_tokens, {facts['no_answer']} have no answer{long}")


def synthesize(config: ml_collections.ConfigDict, model: Path, round_: int, scratch: Path, out: Path,
               ) -> dict[str, Any]:
  """Samples answers to the round's questions and judges them: samples.jsonl."""
  sample, temperatures = config.sample, temperatures_of(config, round_)
  asked = questions.of_round(config, round_)
  examples, long = fitting(config, model, asked.asked, limit="sample.max_new_tokens",
                           what=f"task {config.task.name}, train", shots=asked.shots)
  with sampler_of(config, model, sample.batch_size, scratch) as sampler:
    completions = sampler(
        [Prompt(f"round_{round_}/{e.id}", text) for e, text in examples], max_new_tokens=sample.max_new_tokens,
        num_samples=sample.num_samples, temperatures=temperatures, top_p=sample.top_p, stop=sample.stop,
        seed=config.seed, label=f"round {round_}: sample")
  if not distributed.is_main():
    return {}
  rows = judged([e for e, _ in examples], completions, strict=True, temperatures=temperatures)
  files.write_jsonl(out, rows)
  return {"samples": len(rows), "correct": sum(r["correct"] for r in rows), "tokens": sum(r["tokens"] for r in rows),
          "unfinished": sum(r["finish"] == "length" for r in rows), "no_answer": sum(not r["span"] for r in rows),
          "long_prompts": long}


def write_shots(config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
  """The worked examples of the prompts: few_shot.jsonl."""
  shots = questions.of_round(config, 0).shots
  files.write_jsonl(out, [{"id": e.id, "question": e.question, "response": e.rationale} for e in shots])
  return {"examples": len(shots)}


@contextlib.contextmanager
def sampler_of(config: ml_collections.ConfigDict, model: Path, batch_size: int, scratch: Path) -> Iterator[Generate]:
  """A sampler of a model, as the config has it.

  In the folder `scratch` lie by label the samples that have come, from which a killed run goes on.
  """
  with engines.opened(config, model, batch_size=batch_size, scratch=scratch, mesh=lambda: mesh_of(config)) as sampler:
    yield lambda asked, *, label, **options: sampler.generate(
        asked, label=label, journal=scratch / f"{re.sub(r'[^A-Za-z0-9]+', '_', label)}.jsonl", **options)


def fitting(config: ml_collections.ConfigDict, model: Path, examples: Sequence[Example], *, limit: str, what: str,
            shots: Sequence[Example] = (), prompt: protocols.Prompt | None = None,
            ) -> tuple[list[tuple[Example, str]], int]:
  """Questions with their prompts, as far as prompt and answer fit in the model's context, and how many do not.

  Args:
    config: of the run.
    model: whose tokenizer and context count.
    examples: the questions.
    limit: the key of the most tokens of an answer, such as `eval.max_new_tokens`.
    what: whose questions they are, for the error.
    shots: worked examples of the prompt.
    prompt: of a protocol; by default that of the run's samples.

  Raises:
    UserError: when none fits.
  """
  shape = hf.read_config(model)
  tokenizer, positions = load_tokenizer(model, rows=shape.vocab_size), shape.max_positions
  sampled = limit.startswith("sample")
  max_new_tokens = config.sample.max_new_tokens if sampled else protocols.max_new_tokens(config)
  build = prompt or (lambda e, shots, tokenizer: prompts.build_prompt(
      e.question, header=config.prompt.header, examples=shots, style=config.prompt.style, tokenizer=tokenizer))
  asked = [(e, build(e, shots, tokenizer)) for e in examples]
  if not positions:
    return asked, 0
  ids = lambda text: encode_prompt(tokenizer, text, rows=shape.vocab_size)
  fit = [(e, text) for e, text in asked if len(ids(text)) + max_new_tokens <= positions]
  if not fit:
    fewer = f" or config.{'prompt' if sampled else 'eval'}.few_shot" if shots else ""
    raise UserError(f"{what}: none of {len(asked)} prompts leaves room for config.{limit}={max_new_tokens} in the "
                    f"{positions} positions of {model} (max_position_embeddings); lower config.{limit}{fewer}, or take "
                    "another task")
  return fit, len(asked) - len(fit)


def check(config: ml_collections.ConfigDict, base: Path, sampler: Path, draws: bool) -> None:
  """Raises UserError when a prompt cannot be built, or no prompt of a task fits, before anything is spent.

  `sampler` is the model that samples for training, where it `draws`.
  """
  tests = zip(questions.own(config), questions.of_tests(config).values(), strict=True)
  asked = [(base, entry, examples, f"task {questions.name_of(entry)}") for entry, examples in tests]
  if config.merge.base_weight == "auto":
    asked += [(base, entry, questions.general(config, entry), f"merge.auto.general {entry}")
              for entry in config.merge.auto.general]
  asked = [found for found in asked if questions.measure_of(config, found[1]) == "answer"]
  options = [(model, examples, {"limit": "eval.max_new_tokens", "what": what,
                                "shots": questions.shots_of(config, entry),
                                "prompt": protocols.get_protocol(config, questions.name_of(entry)).prompt})
             for model, entry, examples, what in asked]
  if draws:
    found = questions.of_round(config, 0)
    options.append((sampler, found.asked, {"limit": "sample.max_new_tokens", "shots": found.shots,
                                           "what": f"task {config.task.name}, train"}))
  for model, examples, given in options:
    try:  # a few say it, and are quick to read
      fitting(config, model, examples[:_LOOKED_AT], **given)
    except UserError:
      fitting(config, model, examples, **given)


def judged(examples: Sequence[Example], completions: Sequence[Sequence[Completion]], *, strict: bool,
           temperatures: Sequence[float] = (), read: Callable[[str, str], str] = lambda text, kind: text,
           ) -> list[dict[str, Any]]:
  """A row for each sample, with its verdict on what is `read` of it; `temperatures` are those that the samples of a
  question ran at in turn."""
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
