"""Checks by their config.json that models may be merged, and writes the output's config.json and companion files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.errors import UserError, print_once
from imm_jax.model import folder as model_folder

# Averaging weights is meaningless across model families or head layouts, even where the shapes agree.
_MUST_MATCH = ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "hidden_act",
               "activation_function", "num_experts", "num_local_experts", "num_experts_per_tok")
# A mean may still make sense where these differ; the output takes the donor's values.
_MAY_DIFFER = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "sliding_window", "max_position_embeddings",
               "attention_bias", "embedding_multiplier", "logits_scaling", "residual_multiplier",
               "final_logit_softcapping")
_QUANTISATION_KEYS = ("quantization_config", "quantization", "compression_config")
_LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def require_compatible(models: Mapping[str, Path], *, layers_may_differ: bool = False) -> None:
  """Checks that the configs of models allow a merge, and prints a note for each tolerable difference.

  Args:
    models: label -> folder.
    layers_may_differ: allows different numbers of layers, for merges of slices.

  Raises:
    UserError: if a mean is meaningless: different families, numbers of heads or activations, or quantised weights.
  """
  configs = {label: _read_config(folder) for label, folder in models.items()}
  for label, config in configs.items():
    if key := next((key for key in _QUANTISATION_KEYS if config.get(key)), None):
      raise UserError(f"{label} ({models[label]}) has {key} in config.json: quantised weights are not merged; take the "
                      "unquantised model that they were made from")
  (first_label, first), *others = configs.items()
  for label, config in others:
    for key in (*_MUST_MATCH, *(() if layers_may_differ else _LAYER_COUNT_KEYS)):
      a, b = _value_or_default(first, key), _value_or_default(config, key)
      if a is not None and b is not None and a != b:
        raise UserError(f"{label} ({models[label]}) has {key}={b!r} in config.json, {first_label} has {a!r}: their "
                        "weights have no common meaning, so a merge of them makes no sense")
    for key in _MAY_DIFFER:
      if key in first and key in config and first[key] != config[key]:
        print_once(f"note: {label} has {key}={config[key]!r} in config.json, {first_label} {first[key]!r}; the output "
                   "has that of its base")
    if (a := _rotary_settings(first)) != (b := _rotary_settings(config)):
      print_once(f"note: {label} has other rotary embeddings in config.json than {first_label} ({b} and {a}); the "
                 "output has those of its base")


def update_config(out: Path, *, dtype: str | None = None, rows: int | None = None, head: bool | None = None,
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
  changed = dict(config)
  if dtype:
    changed["dtype" if "dtype" in config else "torch_dtype"] = dtype
  if rows:
    changed["vocab_size"] = rows
  if head is not None:
    changed["tie_word_embeddings"] = not head
  if layers is not None:
    old = next((config[key] for key in _LAYER_COUNT_KEYS if key in config), None)
    changed |= {key: len(layers) for key in _LAYER_COUNT_KEYS if key in config} or {"num_hidden_layers": len(layers)}
    for key, value in config.items():  # such as layer_types
      if isinstance(value, list) and len(value) == old:
        changed[key] = [_layer_value(_read_config(folder), key, layer, value) for folder, layer in layers]
  if changed != config:
    path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def copy_companion_files(donor: Path, out: Path) -> None:
  """Copies all that a model needs besides its weights: config, tokenizer, custom code and pipeline modules.

  Raises:
    UserError: if a pipeline module has weights of its own, which would not be merged.
  """
  names = model_folder.list_side_files(donor)
  config = _read_config(donor)
  if config.get("auto_map"):
    names += sorted(path.name for path in donor.glob("*.py"))
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
  for name in names:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
  model_folder.copy_side_files(donor, out, names)


def set_chat_template(out: Path, template: str) -> None:
  """Sets the chat template of the output's tokenizer and removes any other."""
  (out / "chat_template.jinja").write_text(template, encoding="utf-8")
  (out / "chat_template.json").unlink(missing_ok=True)
  path = out / "tokenizer_config.json"
  if path.exists():
    config = files.read_json(path)
    if config.pop("chat_template", None) is not None:
      path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_chat_template(folder: Path) -> str | None:
  """Reads a model's chat template; None if it has none."""
  if (folder / "chat_template.jinja").exists():
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")
  path = folder / "tokenizer_config.json"
  template = files.read_json(path).get("chat_template") if path.exists() else None
  return template if isinstance(template, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
  path = folder / "config.json"
  return files.read_json(path) if path.exists() else {}


def _value_or_default(config: Mapping[str, Any], key: str) -> Any:
  """Returns a value of config.json, with the library's default where the key is absent."""
  if key == "num_key_value_heads":
    return config.get(key) or config.get("num_attention_heads")
  if key == "head_dim" and not config.get(key) and config.get("hidden_size") and config.get("num_attention_heads"):
    return config["hidden_size"] // config["num_attention_heads"]
  return config.get(key)


def _rotary_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of the rotary embedding, from configs of the old or the new form."""
  parameters = config.get("rope_parameters") or {}
  scaling = config.get("rope_scaling") or {k: v for k, v in parameters.items() if k != "rope_theta"}
  scaling = {k: v for k, v in scaling.items() if v not in (None, "default")}
  theta = config.get("rope_theta", parameters.get("rope_theta"))
  return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


def _layer_value(config: Mapping[str, Any], key: str, layer: int, default: list[Any]) -> Any:
  values = config.get(key)
  return values[layer] if isinstance(values, list) and layer < len(values) else default[min(layer, len(default) - 1)]
