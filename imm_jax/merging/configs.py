"""Whether models may be merged by what their config.json says, and the config.json of what comes out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imm_jax import files
from imm_jax.errors import UserError, say_once
from imm_jax.model import folder as checkpoint

# Weights of other kinds of model, or of heads cut in another way, have no mean even where their shapes agree.
_MEANING = ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "hidden_act",
            "activation_function", "num_experts", "num_local_experts", "num_experts_per_tok")
# Where these differ a mean may make sense; the output has the donor's.
_NOTED = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "sliding_window", "max_position_embeddings",
          "attention_bias", "embedding_multiplier", "logits_scaling", "residual_multiplier", "final_logit_softcapping")
_QUANTISED = ("quantization_config", "quantization", "compression_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def compare(models: Mapping[str, Path], *, layers_may_differ: bool = False) -> None:
  """Compares the configs of models that are to be merged.

  Prints a line for each difference with which a mean may make sense.

  Args:
    models: label -> folder.
    layers_may_differ: whether only slices of them are taken.

  Raises:
    UserError: where the mean makes no sense: another family, other numbers of heads, another activation, quantised
      weights.
  """
  configs = {label: _config(folder) for label, folder in models.items()}
  for label, config in configs.items():
    if key := next((key for key in _QUANTISED if config.get(key)), None):
      raise UserError(f"{label} ({models[label]}) has {key} in config.json: quantised weights are not merged; take the "
                      "unquantised model that they were made from")
  (first_label, first), *others = configs.items()
  for label, config in others:
    for key in (*_MEANING, *(() if layers_may_differ else _LAYERS)):
      a, b = _heads(first, key), _heads(config, key)
      if a is not None and b is not None and a != b:
        raise UserError(f"{label} ({models[label]}) has {key}={b!r} in config.json, {first_label} has {a!r}: their "
                        "weights have no common meaning, so a merge of them makes no sense")
    for key in _NOTED:
      if key in first and key in config and first[key] != config[key]:
        say_once(f"note: {label} has {key}={config[key]!r} in config.json, {first_label} {first[key]!r}; the output "
                 "has that of its base")
    if (a := _rotary(first)) != (b := _rotary(config)):
      say_once(f"note: {label} has other rotary embeddings in config.json than {first_label} ({b} and {a}); the output "
               "has those of its base")


def adjust(out: Path, *, dtype: str | None = None, rows: int | None = None, head: bool | None = None,
           layers: list[tuple[Path, int]] | None = None) -> None:
  """Makes the copied config.json that of the output.

  Args:
    out: the output's folder.
    dtype: its weights' dtype.
    rows: its vocabulary's size.
    head: whether it has a head of its own; None to leave what is said of that.
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
    old = next((config[key] for key in _LAYERS if key in config), None)
    changed |= {key: len(layers) for key in _LAYERS if key in config} or {"num_hidden_layers": len(layers)}
    for key, value in config.items():  # such as layer_types
      if isinstance(value, list) and len(value) == old:
        changed[key] = [_of_layer(_config(folder), key, layer, value) for folder, layer in layers]
  if changed != config:
    path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def copy_beside(donor: Path, out: Path) -> None:
  """Copies what a model needs beside its weights: config, tokenizer, code that config.json names, its pipeline.

  Raises:
    UserError: for a part of the pipeline with weights of its own, which are not merged.
  """
  names = checkpoint.side_files(donor)
  config = _config(donor)
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
      found = sorted(path.relative_to(donor).as_posix() for path in part.rglob("*") if path.is_file())
      if weights := next((name for name in found if name.endswith((".safetensors", ".bin", ".pt"))), None):
        raise UserError(f"{donor}: modules.json names {module['path']}, which has weights of its own ({weights}), and "
                        "such are not merged; remove it from modules.json and add it to the output yourself")
      names += found
  for name in names:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
  checkpoint.copy_side_files(donor, out, names)


def set_template(out: Path, template: str) -> None:
  """Gives the output's tokenizer this chat template, and no other."""
  (out / "chat_template.jinja").write_text(template, encoding="utf-8")
  (out / "chat_template.json").unlink(missing_ok=True)
  path = out / "tokenizer_config.json"
  if path.exists():
    config = files.read_json(path)
    if config.pop("chat_template", None) is not None:
      path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def template_of(folder: Path) -> str | None:
  """A model's chat template, if it has one."""
  if (folder / "chat_template.jinja").exists():
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")
  path = folder / "tokenizer_config.json"
  found = files.read_json(path).get("chat_template") if path.exists() else None
  return found if isinstance(found, str) else None


def _config(folder: Path) -> dict[str, Any]:
  path = folder / "config.json"
  return files.read_json(path) if path.exists() else {}


def _heads(config: Mapping[str, Any], key: str) -> Any:
  """A value of config.json, with what it is where it is left out."""
  if key == "num_key_value_heads":
    return config.get(key) or config.get("num_attention_heads")
  if key == "head_dim" and not config.get(key) and config.get("hidden_size") and config.get("num_attention_heads"):
    return config["hidden_size"] // config["num_attention_heads"]
  return config.get(key)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
  """What decides the rotary embedding, in the forms of old and new configs."""
  parameters = config.get("rope_parameters") or {}
  scaling = config.get("rope_scaling") or {k: v for k, v in parameters.items() if k != "rope_theta"}
  scaling = {k: v for k, v in scaling.items() if v not in (None, "default")}
  theta = config.get("rope_theta", parameters.get("rope_theta"))
  return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


def _of_layer(config: Mapping[str, Any], key: str, layer: int, default: list[Any]) -> Any:
  values = config.get(key)
  return values[layer] if isinstance(values, list) and layer < len(values) else default[min(layer, len(default) - 1)]
