"""Pre-trains the embedded base model: a small decoder on generated word problems.

    python -m imm_jax.pretrain --config=configs/tiny_pretrain.py

It takes minutes on 2 cores. The output is an HF folder, which transformers reads; recipe.json in it records its recipe.
"""

import json
import math
import random
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from ml_collections import config_flags
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from imm_jax import cli, files
from imm_jax.config_checks import DTYPES
from imm_jax.config_keys import require
from imm_jax.errors import UserError, suggest
from imm_jax.model import hf, sharding
from imm_jax.model.config import ModelConfig
from imm_jax.model.decoder import init_params
from imm_jax.sampling import Prompt
from imm_jax.sampling.native import NativeSampler
from imm_jax.tasks import answers, arithmetic, prompts
from imm_jax.tasks.base import Example
from imm_jax.training import trainer
from imm_jax.training.computation import Computation
from imm_jax.training.optimization import Optimization, make_schedule
from imm_jax.training.packing import PackedBatches, TokenizedExample
from imm_jax.training.reporting import Reporting

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, a file such as configs/tiny_pretrain.py.")
flags.mark_flag_as_required("config")
_OUT = flags.DEFINE_string("out", "runs/base", "The folder to write; an earlier result is replaced at the end.")

_END = "<|endoftext|>"


def build_tokenizer() -> Qwen2Tokenizer:
  """Trains a byte-level BPE tokenizer of Qwen2's form, in which every word of the generated tasks is one token."""
  texts = [text for family in (*arithmetic.FAMILIES, "drill")
           for example in arithmetic.generate(family, split="pretrain", count=2000, seed=0, distinct=False)
           for text in (prompts.build_prompt(example.question), example.rationale)]
  # AutoTokenizer splits the texts of a Qwen2 model as Qwen2 does, so the training has to, too.
  bpe = Tokenizer(models.BPE())
  bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
  bpe.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=2000, min_frequency=2, show_progress=False, special_tokens=[_END],
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
  model = json.loads(bpe.to_str())["model"]
  tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], eos_token=_END,
                             pad_token=_END, unk_token=None)
  # Each header is one token, which keeps prompts short.
  tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (prompts.INSTRUCTION, prompts.RESPONSE)])
  return tokenizer


def count_examples(config: ml_collections.ConfigDict) -> dict[str, int]:
  """Returns the number of examples of each family that has any, from its share in `config.mixture`."""
  total = sum(config.mixture.values())
  counts = {family: round(config.examples * share / total) for family, share in config.mixture.items()}
  return {family: count for family, count in counts.items() if count}


def build_corpus(config: ml_collections.ConfigDict) -> list[Example]:
  """Generates the pre-training examples, in an order that the seed determines."""
  examples = []
  for family, count in count_examples(config).items():
    examples += arithmetic.generate(family, split="pretrain", count=count, seed=config.seed, distinct=False)
  random.Random(config.seed).shuffle(examples)
  return examples


def validate(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for the first setting that cannot work."""
  for key in ("examples", "global_batch", "row_length", "eval_questions"):
    require(config, key, lambda v: v >= 1, "expected 1 or more")
  require(config, "seed", lambda v: 0 <= v < 2**32, "expected 0 <= seed < 2**32")
  require(config, "learning_rate", lambda v: math.isfinite(v) and v > 0, "expected a number > 0")
  require(config, "warmup_ratio", lambda v: 0 <= v < 1, "expected 0 <= warmup_ratio < 1")
  for key in ("weight_decay", "grad_clip"):
    require(config, key, lambda v: math.isfinite(v) and v >= 0, "expected a number >= 0")
  require(config, "compute_dtype", lambda v: v in DTYPES, f"expected one of: {', '.join(DTYPES)}")
  families = (*arithmetic.FAMILIES, "drill")
  for family in config.mixture:
    if family not in families:
      raise UserError(f"config.mixture has {family!r}: {suggest(family, list(families))}")
  require(config, "mixture", lambda v: all(math.isfinite(s) and s >= 0 for s in v.values()) and sum(v.values()) > 0,
          "expected shares >= 0 with a positive sum")
  if not count_examples(config):
    raise UserError(f"config.examples={config.examples}: too few for the mixture, every family gets none")
  for family in arithmetic.FAMILIES:
    try:
      arithmetic.generate(family, split="test", count=config.eval_questions, seed=0)
    except ValueError as e:
      raise UserError(f"config.eval_questions={config.eval_questions}: {e}") from e


def main() -> None:
  """Trains the model of the config and writes it to --out."""
  config, out = cli.read_config(_CONFIG), Path(_OUT.value)
  validate(config)
  if out.exists() and not (out / "recipe.json").exists():
    raise UserError(f"--out={out}: exists and is no pre-trained model (it has no recipe.json); choose another folder")
  with files.lock(out):  # before the training, so that a folder that cannot be written fails now
    pretrain(config, out)


def pretrain(config: ml_collections.ConfigDict, out: Path) -> None:
  """Trains the model and writes it to an HF folder; prints its accuracy on each family."""
  tokenizer = build_tokenizer()
  hf_config = {
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_act": "silu",
      "vocab_size": len(tokenizer), "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": True,
      "attention_dropout": 0.0, "initializer_range": 0.02, "use_sliding_window": False, "use_cache": True,
      "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
      **config.model.to_dict(),
  }
  model_config = ModelConfig.from_hf(hf_config)
  examples = build_corpus(config)
  tokenized = [_tokenize(tokenizer, example) for example in examples]
  longest = max(len(e.prompt) + len(e.response) for e in tokenized)
  if longest > config.row_length:
    raise UserError(f"config.row_length={config.row_length}: the longest example has {longest} tokens")
  mesh = sharding.make_mesh(data=-1, fsdp=1)
  batches = PackedBatches(tokenized, epochs=1, global_batch=config.global_batch, row_length=config.row_length,
                          seed=config.seed, row_multiple=jax.device_count())
  tokens = sum(len(e.prompt) + len(e.response) for e in tokenized)
  print(f"{len(examples):,} examples, {tokens:,} tokens, {len(batches)} steps of {batches.rows} rows, "
        f"{batches.padding:.1%} padding")
  schedule = make_schedule("linear", peak=config.learning_rate, total_steps=len(batches),
                           warmup_ratio=config.warmup_ratio)
  losses: list[float] = []
  params = trainer.train(
      model_config, lambda: init_params(model_config, key=jax.random.key(config.seed)), batches,
      Optimization(schedule, config.weight_decay, config.grad_clip),
      Computation(mesh, jnp.dtype(config.compute_dtype), remat="full"),
      Reporting(lambda step, **values: losses.append(values["loss"]), "pretrain", log_every=50)).params
  with files.write_atomically(out) as folder:
    folder.mkdir()
    files.write_json(folder / "config.json", hf_config, indent=2)
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    files.write_json(folder / "generation_config.json", generation, indent=2)
    tokenizer.save_pretrained(folder)
    hf.save(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), folder)
    recipe = {"command": shlex.join(["python", "-m", "imm_jax.pretrain", *sys.argv[1:]]),
              "config": config.to_dict(), "examples": len(examples), "tokens": tokens, "steps": len(batches),
              "final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4), "jax": jax.__version__,
              "test_accuracy": _measure_accuracy(folder, config.eval_questions)}
    files.write_json(folder / "recipe.json", recipe, indent=2)
  print(json.dumps(recipe["test_accuracy"], indent=2))


def _tokenize(tokenizer: Qwen2Tokenizer, example: Example) -> TokenizedExample:
  prompt = tokenizer(prompts.build_prompt(example.question))["input_ids"]
  response = tokenizer(example.rationale)["input_ids"] + [tokenizer.eos_token_id]
  return TokenizedExample(prompt, response)


def _measure_accuracy(folder: Path, count: int) -> dict[str, float]:
  """Returns the greedy accuracy on `count` test questions of each family."""
  sampler = NativeSampler(folder, compute_dtype="float32", batch_size=100)
  accuracy = {}
  for family in arithmetic.FAMILIES:
    examples = arithmetic.generate(family, split="test", count=count, seed=0)
    questions = [Prompt(e.id, prompts.build_prompt(e.question)) for e in examples]
    completions = sampler.generate(questions, max_new_tokens=48, label=family)
    right = [answers.verdict(c[0].text, e.answer, e.kind, strict=False).correct
             for c, e in zip(completions, examples, strict=True)]
    accuracy[family] = sum(right) / len(right)
  return accuracy


if __name__ == "__main__":
  cli.run(main)
