"""Which keys of a config.json a decoder depends on, and which are known to change nothing it computes."""

from typing import Any

from imm_jax.errors import UserError, nearest

# model_type -> the class of transformers whose weights are read.
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

_READ = frozenset((
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
    "rope_parameters", "rope_scaling", "original_max_position_embeddings", "max_position_embeddings", "layer_types"))

# What transformers 4 and 5 write and what publishers of these families add, of which no result depends.
_HARMLESS = frozenset((
    # Ids and texts of tokens, and what generation and classification would take by default.
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "tokenizer_class", "prefix", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    # How a program runs and what it returns.
    "use_cache", "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "torchscript", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "is_decoder", "tf_legacy_loss",
    # Where the weights come from and how they are stored.
    "dtype", "torch_dtype", "use_bfloat16", "initializer_range", "transformers_version", "_name_or_path",
    "max_sequence_length", "unsloth_fixed", "unsloth_version",
    # The layer from which windows slide, and their width; nothing where they do not.
    "max_window_layers", "sliding_window"))


def check(config: dict[str, Any], source: str) -> str:
  """The model family of a config.json of which every key is known.

  Raises:
    UserError: for another architecture, an option that changes the arithmetic and is not supported, or a key that is
      not known to be harmless; the message begins with `source`.
  """
  family = config.get("model_type")
  if not isinstance(family, str) or family not in ARCHITECTURES:
    raise UserError(f"{source}: model_type={family!r} is not supported; {nearest(str(family), list(ARCHITECTURES))}")
  architectures = config.get("architectures") or []
  if not isinstance(architectures, list) or (architectures and ARCHITECTURES[family] not in architectures):
    raise UserError(f"{source}: architectures={architectures!r} is not supported; expected "
                    f"[{ARCHITECTURES[family]!r}] for model_type={family!r}")
  slides = config.get("use_sliding_window", family == "llama" and config.get("sliding_window") is not None)
  supported = {
      "hidden_act": config.get("hidden_act", "silu") == "silu",
      "use_sliding_window": not config.get("use_sliding_window"),
      "sliding_window": not slides,
      "attention_bias": family == "qwen2" or not config.get("attention_bias"),
      "mlp_bias": not config.get("mlp_bias"),
      "attention_dropout": not config.get("attention_dropout"),
      "partial_rotary_factor": config.get("partial_rotary_factor") in (None, 1),
      "pretraining_tp": config.get("pretraining_tp") in (None, 1),
      "is_causal": config.get("is_causal", True) is True}
  for key, value in config.items():
    if not supported.get(key, True):
      raise UserError(f"{source}: {key}={value!r} changes the arithmetic and is not supported")
    if key not in supported and key not in _READ | _HARMLESS and not _is_off(value):
      raise UserError(f"{source}: {key}={value!r:.200} is not known to be harmless: it may change the arithmetic, so "
                      "the model is not read")
  layers = config.get("layer_types")
  if layers is not None and not isinstance(layers, list):
    raise UserError(f"{source}: layer_types={layers!r}; expected a list")
  other = next((kind for kind in layers or [] if kind != "full_attention"), None)
  if other is not None:
    raise UserError(f"{source}: layer_types={other!r} changes the arithmetic and is not supported")
  if layers and len(layers) != config.get("num_hidden_layers"):
    raise UserError(f"{source}: layer_types has {len(layers)} entries, num_hidden_layers is "
                    f"{config.get('num_hidden_layers')!r}")
  return family


def rope(config: dict[str, Any], source: str) -> tuple[str, dict[str, Any]]:
  """What turns the heads: the key that says it, and its values with `rope_type` and `rope_theta` in any case.

  transformers 5 writes rope_parameters, older releases rope_theta and rope_scaling; a file may hold both.

  Raises:
    UserError: where they disagree, or a value is not supported or not known.
  """
  found = {}
  for where in ("rope_parameters", "rope_scaling"):
    given = config.get(where)
    if given is None or given == {}:
      continue
    if not isinstance(given, dict):
      raise UserError(f"{source}: {where}={given!r}; expected an object")
    found[where] = _normalised(config, where, given, source)
  if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
    raise UserError(f"{source}: rope_parameters={config['rope_parameters']!r} and rope_scaling="
                    f"{config['rope_scaling']!r} disagree; remove the one that is not meant")
  return next(iter(found.items()), None) or ("rope_parameters", _normalised(config, "rope_parameters", {}, source))


def _normalised(config: dict[str, Any], where: str, given: dict[str, Any], source: str) -> dict[str, Any]:
  kind = given.get("rope_type") or given.get("type") or "default"
  if given.get("type", kind) != kind:
    raise UserError(f"{source}: {where}.rope_type={kind!r} and {where}.type={given['type']!r} disagree")
  if kind not in ("default", "llama3"):
    raise UserError(f"{source}: {where}.rope_type={kind!r} changes the arithmetic and is not supported")
  values = {"rope_type": kind} | {key: value for key, value in given.items() if key != "type" and not _is_off(value)}
  for key, default in (("rope_theta", 10_000.0), ("original_max_position_embeddings", None)):
    above = config.get(key)
    if above is not None and given.get(key, above) != above:
      raise UserError(f"{source}: {key}={above!r} and {where}.{key}={given[key]!r} disagree")
    if key not in given:
      values[key] = default if above is None else above
  known = {"rope_type", "rope_theta", "original_max_position_embeddings"}
  known |= {"factor", "low_freq_factor", "high_freq_factor"} if kind == "llama3" else set()
  for key, value in values.items():
    if key not in known and (key, value) != ("partial_rotary_factor", 1):
      raise UserError(f"{source}: {where}.{key}={value!r:.200} changes the arithmetic and is not supported")
  return {key: value for key, value in values.items() if key in known}


def _is_off(value: object) -> bool:
  return value is None or value is False or (isinstance(value, str | list | dict) and not value)
