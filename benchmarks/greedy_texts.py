"""Compares float32 greedy answers to real questions: native sampler, transformers and, if installed, vLLM.

    python benchmarks/greedy_texts.py --model=FOLDER --task=svamp --source=file:SVAMP.json --questions=64 \
        --vllm_python=.vllm/bin/python

Prints how many texts are exactly equal, and the first that is not. transformers and vLLM get the native sampler's
prompt tokens.
"""

import tempfile

from absl import app, flags

from imm_jax import tasks
from imm_jax.model import hf, hub
from imm_jax.sampling import Completion, Prompt, completions
from imm_jax.sampling.native import NativeSampler
from imm_jax.sampling.vllm import VllmSampler
from imm_jax.tasks import prompts

_MODEL = flags.DEFINE_string("model", None, "An HF checkpoint folder or hub id.", required=True)
_TASK = flags.DEFINE_string("task", "svamp", "Task whose test questions are asked.")
_SOURCE = flags.DEFINE_string("source", "", "Source of the questions; empty for the published one.")
_QUESTIONS = flags.DEFINE_integer("questions", 64, "Number of questions.")
_STYLE = flags.DEFINE_enum("style", "paper", prompts.STYLES, "Style of the prompts.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Maximum tokens per answer.")
_VLLM_PYTHON = flags.DEFINE_string("vllm_python", "", "The Python of an environment with vLLM; empty leaves it out.")
_VLLM_ARGS = flags.DEFINE_multi_string("vllm_arg", [], "An argument of vLLM's server; may be repeated.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Rows of the native sampler.")


def _transformers_texts(folder: str, ids: list[list[int]], ends: tuple[int, ...], sampler: NativeSampler,
                        ) -> list[Completion]:
  """Generates with transformers, one question at a time to avoid padding."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
  answers = []
  for row in ids:
    with torch.no_grad():
      out = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
                           max_new_tokens=_NEW_TOKENS.value, do_sample=False, eos_token_id=list(ends),
                           pad_token_id=ends[0])
    answers.append(completions.completion(sampler.tokenizer, out[0, len(row):].numpy(), ends, ()))
  return answers


def _compare(name: str, peer: list[Completion], native: list[Completion], asked: list[Prompt]) -> None:
  different = [i for i, (a, b) in enumerate(zip(peer, native, strict=True)) if a.text != b.text]
  equal = len(native) - len(different)
  print(f"native and {name}: {equal} of {len(native)} texts are equal in every character", flush=True)
  if different:
    i = different[0]
    print(f"first that differs: {asked[i].id}\n  {name}: {peer[i].text!r}\n  native: {native[i].text!r}")


def main(_: list[str]) -> None:
  folder = hub.resolve(_MODEL.value)
  sampler = NativeSampler(folder, compute_dtype="float32", batch_size=_BATCH.value)
  examples = tasks.load(_TASK.value, split="test", count=_QUESTIONS.value, seed=0, source=_SOURCE.value)
  asked = [Prompt(e.id, prompts.build_prompt(e.question, style=_STYLE.value, tokenizer=sampler.tokenizer))
           for e in examples]
  native = [group[0] for group in sampler.generate(asked, max_new_tokens=_NEW_TOKENS.value)]
  print(f"{len(native)} questions of {_TASK.value}, style {_STYLE.value}: {sum(c.num_tokens for c in native)} tokens, "
        f"{sum(c.finish == 'length' for c in native)} answers cut at {_NEW_TOKENS.value}", flush=True)
  rows = hf.read_config(folder).vocab_size
  ids = completions.encode(sampler.tokenizer, asked, rows)
  ends, _ = completions.endings(sampler.tokenizer, sampler._eos, (), rows)
  _compare("transformers", _transformers_texts(str(folder), ids, ends, sampler), native, asked)
  if _VLLM_PYTHON.value:
    with tempfile.TemporaryDirectory() as logs, VllmSampler(
        folder, python=_VLLM_PYTHON.value, args=_VLLM_ARGS.value, compute_dtype="float32",
        log=f"{logs}/vllm.log") as vllm:
      _compare("vLLM", [group[0] for group in vllm.generate(asked, max_new_tokens=_NEW_TOKENS.value)], native, asked)


if __name__ == "__main__":
  app.run(main)
