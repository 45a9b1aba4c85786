"""Classifies the keys of a config.json: those that are read, those restricted to certain values, those without effect.

A key matters if the family's config class in transformers declares it or transformers' shared code reads it; a test
compares these tables with the installed classes and sources. All other keys are ignored, whatever their values.
"""

from collections.abc import Callable, Mapping
from typing import Any

from imm_jax.errors import UserError
from imm_jax.model.families import COMMON, FAMILIES, Family

_READ_KEYS = frozenset((
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rope_scaling",
    "original_max_position_embeddings", "max_position_embeddings", "layer_types", "sliding_window",
    "partial_rotary_factor", "is_causal", *COMMON))

# Keys that transformers declares, reads or has written, and that do not affect any result here.
NO_EFFECT = frozenset((
    # Token ids and strings, and defaults of generation and classification.
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "tokenizer_class", "prefix", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    # Heads other than the language model's, and dropout, which training here does not use.
    "attention_dropout", "classifier_dropout", "hidden_dropout", "token_classification_bias", "unpadded_vocab_size",
    # Execution and return values.
    "use_cache", "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "torchscript", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "is_decoder", "tf_legacy_loss", "pretraining_tp", "gradient_checkpointing",
    "distributed_config", "fusion_config", "capture_scalar_outputs", "sub_config_name",
    # Origin, storage and initialization of the weights.
    "dtype", "torch_dtype", "use_bfloat16", "initializer_range", "initializer_factor", "init_std",
    "transformers_version", "transformers_weights", "_name_or_path", "unsloth_fixed", "unsloth_version"))

_QUANTIZED = "quantized weights are not read; take the unquantized model that they were made from"
_PARTS = ("the model has parts besides the language model, which are not read; save only its language model, with its "
          "own config.json")
_PAIR = "the model reads the output of another one (an encoder), which is not supported; take a decoder-only model"
_EXPERTS = "mixtures of experts are not supported; take a dense model"
_SEVERAL = "heads for several tokens are not supported; take a model that predicts only the next token"
# Keys of transformers' shared code that must be off (null, false, 0 or empty), and why.
_MUST_BE_OFF = {
    "quantization_config": _QUANTIZED, "quantization": _QUANTIZED, "compression_config": _QUANTIZED,
    "auto_map": "the model runs code of its own, which is not run; take one that transformers has a class for",
    **dict.fromkeys(("text_config", "vision_config", "audio_config", "text_encoder", "generator"), _PARTS),
    **dict.fromkeys(("encoder", "decoder", "is_encoder_decoder", "add_cross_attention",
                     "cross_attention_hidden_size"), _PAIR),
    "pruned_heads": "heads were taken out of the model, which is not supported; take it as it was before",
    "attention_chunk_size": "attention by chunks is not supported",
    "per_layer_config": "layers that differ are not supported", "num_kv_shared_layers": "layers that share keys and "
    "values are not supported", **dict.fromkeys(("first_k_dense_replace", "mlp_layer_types"), _EXPERTS),
    **dict.fromkeys(("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types", "mtp_per_layer_config",
                     "mtp_hidden_states_first", "chain_hidden_post_norm"), _SEVERAL),
    "logits_mup_width_multiplier": "logits with a multiplier of this kind are not supported"}


def check_keys(config: Mapping[str, Any], source: str) -> tuple[Family, list[str]]:
  """Checks that no key of a config.json asks for unsupported arithmetic.

  Returns:
    The model's family, and the ignored keys: those that are set and that transformers does not read for this family.

  Raises:
    UserError: for an unsupported architecture or value; the message begins with `source`.
  """
  name = config.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    # No "did you mean" here: files do not have typos, and loading the weights as another family would be wrong.
    raise UserError(f"{source}: model_type={name!r:.100} is not supported; expected one of: {', '.join(FAMILIES)}")
  family = FAMILIES[name]
  _check_architectures(config.get("architectures") or [], name, family, source)
  for key, reason in _MUST_BE_OFF.items():
    if config.get(key):
      raise UserError(f"{source}: {key}={config[key]!r:.100}: {reason}")
  for key, allowed in (("partial_rotary_factor", (None, 1)), ("is_causal", (True,))):
    if (value := config.get(key, allowed[0])) not in allowed:
      raise UserError(f"{source}: {key}={value!r} changes the arithmetic and is not supported")
  _check_windows(config, family, source)
  known = known_keys(family)
  return family, [key for key, value in config.items() if key not in known and value]


def known_keys(family: Family) -> frozenset[str]:
  """Lists the keys that are read, checked, or known to have no effect."""
  return _READ_KEYS | NO_EFFECT | _MUST_BE_OFF.keys() | family.keys.keys()


def make_reader(config: Mapping[str, Any], family: Family) -> Callable[[str], Any]:
  """Returns a function from a key to its value in the file, the family's default, or None if it has no effect."""
  declared = {**COMMON, **family.keys}
  return lambda key: config.get(key, declared[key]) if key in declared else None


def _check_architectures(given: object, name: str, family: Family, source: str) -> None:
  # Some published configs have FSDP's wrapper in the name, or Llama's first spelling.
  normalize = lambda text: str(text).lower().removeprefix("fsdp")
  if not isinstance(given, list) or (given and normalize(family.architecture) not in map(normalize, given)):
    raise UserError(f"{source}: architectures={given!r} is not supported; expected [{family.architecture!r}] for "
                    f"model_type={name!r}")


def _check_windows(config: Mapping[str, Any], family: Family, source: str) -> None:
  """Raises UserError if some layer has sliding-window attention."""
  count, layers = config.get("num_hidden_layers"), config.get("layer_types")
  if layers is not None and not isinstance(layers, list):
    raise UserError(f"{source}: layer_types={layers!r}; expected a list")
  other = next((kind for kind in layers or [] if kind not in ("full_attention", "attention")), None)
  if other is not None:
    raise UserError(f"{source}: layer_types={other!r} changes the arithmetic and is not supported; expected "
                    "only 'full_attention'")
  if layers and len(layers) != count:
    raise UserError(f"{source}: layer_types has {len(layers)} entries, num_hidden_layers is {count!r}")
  read = make_reader(config, family)
  window = config.get("sliding_window", read("sliding_window"))
  if family.windows_by_layer:
    first = read("max_window_layers")
    all_full = layers or (isinstance(first, int) and isinstance(count, int) and first >= count)
    if not read("use_sliding_window") or all_full:
      return
    window = f"{window!r} with use_sliding_window={config['use_sliding_window']!r}" if window is not None else None
  if window is not None:
    raise UserError(f"{source}: sliding_window={window}: attention within a window is not supported; where all texts "
                    "are shorter than it, null gives the same results")
