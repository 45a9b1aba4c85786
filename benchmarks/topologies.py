"""Memory, step time and MFU of training models on TPU slices, as estimated by the compiler; needs no TPU.

    python benchmarks/topologies.py --out=benchmarks/topologies.json
    python benchmarks/topologies.py --out=FILE --models=llama-2-7b --topologies=v5e:4x4

Needs libtpu (`pip install -e '.[aot]'`). A cell takes one to three minutes; cells that FILE holds are not repeated.
Rows have 2048 tokens, compute is bfloat16, master weights and AdamW's moments are float32. The first of SETTINGS that
fits is reported.
"""

import json
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags

from imm_jax.aot import check, topology
from imm_jax.errors import UserError
from imm_jax.model import published

_OUT = flags.DEFINE_string("out", None, "Results, a JSON object per cell.", required=True)
_MODELS = flags.DEFINE_list("models", [], "Names; all if empty.")
_TOPOLOGIES = flags.DEFINE_list("topologies", [], "Names; all if empty.")

LENGTH = 2048
MODELS = {name: published.MODELS[hub_id] for name, hub_id in {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B", "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf", "llama-3-8b": "meta-llama/Meta-Llama-3-8B"}.items()}
# Name -> (libtpu's name of the topology, slices, size of `data`). v5p counts cores: v5p-16 has 8 chips.
TOPOLOGIES = {
    "v5e-16": ("v5e:4x4", 1, 1),
    "v5e-256": ("v5e:16x16", 1, 16),
    "v5p-16": ("v5p:2x2x2", 1, 1),
    "v6e-16": ("v6e:4x4", 1, 1),
    "2 x v5e-256": ("v5e:16x16", 2, 32),
}
# (rows per chip, rematerialization).
SETTINGS = ((2, "attention"), (2, "full"), (1, "full"))


def cell(model: str, name: str) -> dict[str, object]:
  """Compiles a model for a slice; returns the figures."""
  topology_name, slices, data = TOPOLOGIES[name]
  slice_ = topology.describe_slice(topology_name, slices=slices)
  mesh = slice_.mesh(data=data, fsdp=-1, tensor=1)
  for rows, remat in SETTINGS:
    plan = check.StepPlan(MODELS[model], slice_, mesh, rows, LENGTH, 1, remat, "auto", jnp.dtype("bfloat16"))
    report = check.compile_step(plan)
    if not report.excess:
      break
  result = {"model": model, "slice": name, "mesh": dict(mesh.shape), "rows": rows, "remat": remat,
            "attention": report.attention, "fits": not report.excess, "compile_s": round(report.seconds, 1)}
  if report.excess:
    return result | {"needs": report.excess}
  e = report.estimate
  longest, terms = e.compute_roofline(slice_, report.flops)
  largest = max(c.size for c in e.collectives if c.kind == "all-gather")
  return result | {
      "arguments_gib": report.memory["arguments"] / 2**30, "peak_gib": report.memory["peak"] / 2**30,
      "hbm_gib": slice_.chip.hbm / 2**30, "step_ms": 1e3 * e.seconds, "compute_ms": 1e3 * e.compute,
      "kernels_ms": 1e3 * e.kernels, "beside_ms": 1e3 * e.overlapped, "alone_ms": 1e3 * e.exposed,
      "ideal_ms": 1e3 * report.ideal, "ratio": e.seconds / report.ideal, "mfu": report.mfu,
      "roofline_ms": 1e3 * longest, "roofline_terms_ms": {k: 1e3 * t for k, t in terms.items()},
      "tflop": report.flops / 1e12, "tokens_per_s": mesh.size * plan.tokens / e.seconds,
      "largest_gather_mb": largest / 1e6, "layer_mb": check.largest_working_set(plan.model, plan.compute_dtype) / 1e6}


def table(cells: list[dict[str, object]]) -> str:
  """Returns a Markdown table with a row per cell."""
  lines = ["| model | slice | rows a chip, remat | peak GiB of | step ms | times 6N | MFU | roofline ms | alone ms |",
           "|---|---|---|---|---|---|---|---|---|"]
  for c in cells:
    start = f"| {c['model']} | {c['slice']} | {c['rows']}, {c['remat']} | "
    lines.append(start + (
        f"{c['peak_gib']:.1f} of {c['hbm_gib']:.1f} | {c['step_ms']:.0f} | {c['ratio']:.2f} | {c['mfu']:.0%} | "
        f"{c['roofline_ms']:.0f} | {c['alone_ms']:.0f} |" if c["fits"] else f"does not fit: {c['needs']} | | | | | |"))
  return "\n".join(lines)


def main(_: list[str]) -> None:
  out = Path(_OUT.value)
  cells = {(c["model"], c["slice"]): c for c in json.loads(out.read_text())} if out.exists() else {}
  for name in _TOPOLOGIES.value or TOPOLOGIES:
    for model in _MODELS.value or MODELS:
      if (model, name) not in cells:
        cells[model, name] = cell(model, name)
        print(json.dumps(cells[model, name]), flush=True)
        out.write_text("[\n" + ",\n".join(json.dumps(c) for c in cells.values()) + "\n]\n")
  print(table(list(cells.values())))


if __name__ == "__main__":
  try:
    app.run(main)
  except UserError as e:
    raise SystemExit(f"error: {e}") from e
