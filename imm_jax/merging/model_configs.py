"""Checks by their config.json that models may be merged, and writes the output's config.json and companion files."""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.errors import UserError, join_items, print_once
from imm_jax.model import checkpoint_folder

# Averaging weights is meaningless across model families or head layouts, even where the shapes agree. Families have
# names of their own for heads (num_attention_heads, encoder_attention_heads, n_head, kv_n_heads, ...) and activations
# (hidden_act, activation_function, feed_forward_proj, ...).
_MUST_MATCH = re.compile(
    r"^(model_type|multi_query|alibi|d_kv|feed_forward_proj)$|(^|_)(n_heads?|num_heads|n_head_kv|head_dim|head_size|"
    r"(attention|attn|query|key|value|kv)_heads|query_groups|((num|routed|local|shared)_)experts(_per_tok)?|"
    r"(act|activation|afn)(_fn|_function)?)$")
_LAYER_COUNTS = re.compile(r"(^|_)(hidden|n|num|encoder|decoder)_layers?$")
# A mean may still make sense where these differ; the output takes the donor's values.
_MAY_DIFFER = re.compile(
    r"(^|_)eps(ilon)?(_|$)|^(sliding_window|max_position_embeddings|n_positions|max_seq_len|attention_bias|"
    r"embedding_multiplier|logits_scaling|logit_scale|residual_multiplier|query_pre_attn_scalar|"
    r"attn_logit_softcapping|final_logit_softcapping)$")
_ROTARY = re.compile(r"(^|_)(rope|rotary|rot)(_|$)")
# Names of the base and of the share of rotated entries, and where both and the scaling stand by now.
_ROTARY_BASES, _ROTARY_SHARES = ("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")
_ROTARY_FORMS = (*_ROTARY_BASES, *_ROTARY_SHARES, "rope_parameters", "rope_scaling")
_QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")
_LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Files whose auto_map names code beside them.
_MAPPED = ("tokenizer_config.json", *checkpoint_folder.MODEL_SIDE_FILES)
# Suffixes of files that a model may need, and names of such that none does.
_COMPANIONS = (".json", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".codes", ".vocab", ".bpe")
_NO_COMPANIONS = re.compile(r".*\.index\.json|(trainer_state|merge|adapter_config|.*_results)\.json|handler\.py")
# Configs of the language model within that of a model of several parts.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# Lists with an entry for each layer, and lists of the layers that differ from others.
_PER_LAYER = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_layers", "block_configs",
              "no_rope_layers", "activation_sparsity_pattern", "intermediate_size", "num_query_heads", "num_kv_heads",
              "ffn_multipliers")
_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers")


def check_compatible(models: Mapping[str, Path], *, donor: Path | None = None, layers_may_differ: bool = False,
                       ) -> None:
  """Checks that the configs of models allow a merge, and prints a note for each tolerable difference.

  Nested configs, such as those of text and vision, are compared too.

  Args:
    models: label -> folder.
    donor: folder of the config that the output takes, with which the others are compared; the first by default.
    layers_may_differ: allows different numbers of layers, for merges of slices.

  Raises:
    UserError: if a config.json is missing, or a mean is meaningless: different families, numbers of heads or
      activations, or quantized weights.
  """
  folders = {folder: label for label, folder in reversed(models.items())}  # once, by the first label
  first = next(iter(models.values())) if donor is None else donor
  parts = {}
  for folder in sorted({first: None} | dict.fromkeys(models.values()), key=lambda folder: folder != first):
    label = folders.get(folder, "base_model")
    checkpoint_folder.check_model_folder(folder)
    parts[label] = _split_config(files.read_json(folder / "config.json"))
    for part, config in parts[label].items():
      if key := next((key for key in _QUANTIZATION_KEYS if config.get(key)), None):
        raise UserError(f"{label} ({folder}) has {part}{key} in config.json: quantized weights are not merged; take "
                        "the unquantized model that they were made from")
  (first_label, first_parts), *others = parts.items()
  for label, own_parts in others:
    for part in filter(own_parts.__contains__, first_parts):
      config, other = first_parts[part], own_parts[part]
      differing = [key for key in config if key in other and config[key] != other[key]]
      if layers_may_differ:
        differing = [key for key in differing if not _LAYER_COUNTS.search(key) and not isinstance(config[key], list)]
      for key in differing:
        if None not in (config[key], other[key]) and (_MUST_MATCH.search(key) or _LAYER_COUNTS.search(key)):
          raise UserError(f"{label} ({models[label]}) has {part}{key}={other[key]!r} in config.json, {first_label} has "
                          f"{config[key]!r}: their weights have no common meaning, so a merge of them makes no sense")
        if isinstance(config[key], list) and key in _PER_LAYER + _LAYER_NUMBERS:
          print_once(f"note: {label} has other {part}{key} in config.json than {first_label}; the output has those of "
                     "its base")
        elif _MAY_DIFFER.search(key) or (_ROTARY.search(key) and key not in _ROTARY_FORMS):
          print_once(f"note: {label} has {part}{key}={other[key]!r} in config.json, {first_label} {config[key]!r}; the "
                     "output has that of its base")
      if (a := _rotary_settings(config)) != (b := _rotary_settings(other)):
        print_once(f"note: {label} has other rotary embeddings in {part and f'{part[:-1]} of '}config.json than "
                   f"{first_label} ({b} and {a}); the output has those of its base")


def update_config(out: Path, *, dtype: str, rows: int | None = None, head: bool | None = None,
                  layers: list[tuple[Path, int]] | None = None) -> None:
  """Updates the copied config.json to describe the output.

  Args:
    out: the output's folder.
    dtype: dtype of its weights.
    rows: size of its vocabulary.
    head: whether it has an untied output head; None leaves `tie_word_embeddings` as it is.
    layers: for each of its layers the folder and layer that it comes from.
  """
  path = out / "config.json"
  config = files.read_json(path)
  changed = copy.deepcopy(config)
  changed["dtype" if "dtype" in config else "torch_dtype"] = dtype
  for _, part in _nested_configs(changed):
    part |= {key: dtype for key in ("dtype", "torch_dtype") if key in part}
  if rows:
    _set_text_value(changed, ("vocab_size",), rows)
  if head is not None:
    for _, part in _text_configs(changed):
      if part is changed or "tie_word_embeddings" in part:
        part["tie_word_embeddings"] = not head
  if layers is not None:
    _set_text_value(changed, _LAYER_COUNT_KEYS, len(layers))
    for names, part in _text_configs(changed):
      sources = [(_at(files.read_json(folder / "config.json"), names), layer) for folder, layer in layers]
      _restack_lists(part, _at(config, names), sources)
  if changed != config:
    files.write_json(path, changed, indent=2)


def ties_embeddings(config: dict[str, Any]) -> bool | None:
  """Returns whether a config.json says that the output head is the embedding; None if it does not say."""
  values = [part.get("tie_word_embeddings") for _, part in _text_configs(config)]
  return next((bool(tied) for tied in values if tied is not None), None)


def read_layer_count(folder: Path) -> int | None:
  """Returns the number of layers of a language model by its config.json; None if that does not say."""
  texts = reversed(_text_configs(files.read_json(folder / "config.json")))
  return next((part[key] for _, part in texts for key in _LAYER_COUNT_KEYS if isinstance(part.get(key), int)), None)


def vocab_size(folder: Path) -> int | None:
  """Returns the size of a model's vocabulary by its config.json; None if that does not say."""
  sizes = [part.get("vocab_size") for _, part in _text_configs(files.read_json(folder / "config.json"))]
  return next((size for size in reversed(sizes) if isinstance(size, int)), None)


def copy_companion_files(donor: Path, out: Path, *, tokenizer: bool = True) -> None:
  """Copies all that a model needs besides its weights: config, tokenizer, custom code and pipeline modules.

  A line names files that may belong to the model too and are not known.

  Args:
    donor: the model's folder.
    out: the folder to write.
    tokenizer: whether to copy its tokenizer and chat templates; without, the output has others.

  Raises:
    UserError: if a pipeline module has weights of its own, which would not be merged.
  """
  known = checkpoint_folder.list_side_files(donor)
  names = known if tokenizer else [name for name in known if name in checkpoint_folder.MODEL_SIDE_FILES]
  if any(files.read_json(donor / name).get("auto_map") for name in names if name in _MAPPED):
    names = names + sorted(path.name for path in donor.glob("*.py"))
  modules = donor / "modules.json"
  if modules.exists():  # sentence-transformers
    names += [name for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
              if (donor / name).exists()]
    for module in json.loads(modules.read_text(encoding="utf-8")):
      part = donor / str(module.get("path", ""))
      if part == donor or not module.get("path"):
        continue
      part_files = sorted(path.relative_to(donor).as_posix() for path in part.rglob("*") if path.is_file())
      if weights := next((name for name in part_files if name.endswith((".safetensors", ".bin", ".pt"))), None):
        raise UserError(f"{donor}: modules.json names {module['path']}, which has weights of its own ({weights}), and "
                        "such are not merged; remove it from modules.json and add it to the output yourself")
      names += part_files
  unknown = sorted(path.name for path in donor.iterdir() if path.is_file() and path.name not in {*known, *names}
                   and path.suffix in _COMPANIONS and not _NO_COMPANIONS.fullmatch(path.name))
  if unknown:
    which = "it" if len(unknown) == 1 else "them"
    print_once(f"note: {donor}: {join_items(unknown)}: not copied; copy {which} yourself if the model needs {which}")
  for name in names:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
  checkpoint_folder.copy_side_files(donor, out, names)


def set_chat_template(out: Path, template: str) -> None:
  """Sets the chat template of the output's tokenizer and removes any other."""
  (out / "chat_template.jinja").write_text(template, encoding="utf-8")
  (out / "chat_template.json").unlink(missing_ok=True)
  path = out / "tokenizer_config.json"
  if path.exists():
    config = files.read_json(path)
    if config.pop("chat_template", None) is not None:
      files.write_json(path, config, indent=2, ensure_ascii=False)


def read_chat_template(folder: Path) -> str | None:
  """Reads a model's chat template; None if it has none."""
  if (folder / "chat_template.jinja").exists():
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")
  path = folder / "tokenizer_config.json"
  template = files.read_json(path).get("chat_template") if path.exists() else None
  return template if isinstance(template, str) else None


def _nested_configs(config: Mapping[str, Any], names: tuple[str, ...] = (),
                    ) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
  """Yields path and content of every config within a config.json, outer ones first."""
  for key, value in config.items():
    if isinstance(value, dict) and key not in _QUANTIZATION_KEYS and (key.endswith("_config") or "model_type" in value):
      yield (*names, key), value
      yield from _nested_configs(value, (*names, key))


def _text_configs(config: dict[str, Any]) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
  """Returns path and content of the configs that may describe the language model, the outermost first."""
  return [((), config), *((names, part) for names, part in _nested_configs(config) if names[-1] in _TEXT_CONFIGS)]


def _split_config(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the configs of a model's parts by the prefix of their keys.

  The language model's may stand at the top or in a config of its own, depending on the version of transformers, so
  they are taken together.
  """
  texts = _text_configs(config)
  result = {".".join(names) + ".": part for names, part in _nested_configs(config) if names[-1] not in _TEXT_CONFIGS}
  joined = dict(config)
  for _, part in texts[1:]:
    joined |= {key: value for key, value in part.items() if key != "model_type" and value is not None}
  return {"": joined, **result}


def _set_text_value(config: dict[str, Any], keys: Sequence[str], value: int) -> None:
  """Sets those of these keys that the configs of the language model have; if there is none, the first of them."""
  texts = _text_configs(config)
  present = [(part, key) for _, part in texts for key in keys if key in part]
  for part, key in present or [(texts[-1][1], keys[0])]:
    part[key] = value


def _at(config: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
  """Returns the nested config at a path; an empty one if there is none."""
  for name in names:
    config = config.get(name) or {}
  return config


def _restack_lists(part: dict[str, Any], old: Mapping[str, Any], sources: Sequence[tuple[Mapping[str, Any], int]],
                   ) -> None:
  """Makes the lists of a config that are over layers anew; `sources` are each layer's config and number there."""
  count = next((old[key] for key in _LAYER_COUNT_KEYS if key in old), None)
  for key, value in old.items():
    if not isinstance(value, list):
      continue
    if key in _LAYER_NUMBERS:
      part[key] = [i for i, (source, layer) in enumerate(sources) if layer in (source.get(key) or [])]
    elif key in _PER_LAYER and len(value) == count:
      part[key] = [_layer_value(source, key, layer, value) for source, layer in sources]
    elif len(value) == count and "layer" in key:
      print_once(f"note: config.json: {key} seems to have an entry for each layer, and is left as it was; check it")


def _rotary_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of the rotary embedding, from configs of the old or the new form."""
  parameters = config.get("rope_parameters") or {}
  values = {**parameters, **{key: config[key] for key in _ROTARY_FORMS if config.get(key) is not None}}
  scaling = config.get("rope_scaling") or {k: v for k, v in parameters.items() if k not in _ROTARY_FORMS}
  scaling = {k: v for k, v in scaling.items() if v not in (None, "default")}
  theta, share = (next((values[key] for key in keys if key in values), None)
                  for keys in (_ROTARY_BASES, _ROTARY_SHARES))
  # A share of 1, all entries, is the default.
  return {"rope_theta": theta} | ({} if share in (None, 1) else {"partial_rotary_factor": share}) | (
      {"rope_scaling": scaling} if scaling else {})


def _layer_value(config: Mapping[str, Any], key: str, layer: int, default: list[Any]) -> Any:
  values = config.get(key)
  return values[layer] if isinstance(values, list) and layer < len(values) else default[min(layer, len(default) - 1)]
