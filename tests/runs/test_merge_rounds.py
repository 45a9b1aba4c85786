"""Merging methods in the rounds: what a weight of the base means to each, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from configs import common, tiny
from imm_jax import config_checks, loop, merging, methods
from imm_jax.errors import UserError
from imm_jax.merging import registry
from imm_jax.merging.options import Option
from imm_jax.runs.run import Checkpoint, Run
from imm_jax.stages import merge, merge_settings
from tests import REPO
from tests.merge_folders import read, write
from tests.merging import every_method

METHODS = [*registry.list_round_methods()]
# Those that scale by layer do not; the others give the base at one end, and if listed the tuned model at the other.
MEANS = [name for name in METHODS if merge_settings.has_strength(name) and not registry.METHODS[name].layers]
LINEAR = {"breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "imm", "linear",
          "task_arithmetic", "ties", "wise_ft"}
TO_TUNED = {*LINEAR, "slerp", "multislerp", "nuslerp"}


@pytest.fixture(scope="module")
def trees() -> dict[str, dict[str, np.ndarray]]:
  rng = np.random.default_rng(0)
  shapes = {"model.embed_tokens.weight": (12, 6), "model.layers.0.mlp.up_proj.weight": (8, 6),
            "model.layers.1.mlp.up_proj.weight": (8, 6), "model.layers.2.mlp.up_proj.weight": (8, 6),
            "model.norm.weight": (6,)}
  base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  moved = lambda size: {n: (x + size * rng.normal(size=x.shape)).astype(np.float32) for n, x in base.items()}
  return {"base": base, "start": moved(0.1), "tuned": moved(0.2)}


@pytest.fixture
def models(trees: dict[str, dict[str, np.ndarray]], tmp_path: Path) -> merge.MergeInputs:
  folders = {name: write(tmp_path / name, tree) for name, tree in trees.items()}
  return merge.MergeInputs(folders["base"], folders["start"], [folders["tuned"]], None)


def settings(method: str, **changes: object) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.merge.method, config.merge.drop_rate = method, 0.0
  config.merge.update(changes)
  known = registry.METHODS[method] if method else None
  for option in known.options if known else ():  # what the method needs and no other setting gives
    if option.suggested is registry.REQUIRED and option.name not in {known.strength_option, *config.to_dict()["merge"],
                                                                     "densities", "importance"}:
      config.merge.options[option.name] = every_method.OPTIONS[method][option.name]
  return config


def merged(config: ml_collections.ConfigDict, models: merge.MergeInputs, out: Path) -> dict[str, np.ndarray]:
  merge.merge(config, models, 0, None, out)
  return read(out)


@pytest.mark.parametrize("method", MEANS)
def test_base_weight_ends_are_tuned_and_base(
    method: str, models: merge.MergeInputs, trees: dict[str, dict[str, np.ndarray]], tmp_path: Path) -> None:
  """Where nothing is dropped; half of the way, means and task vectors are half of each."""
  for weight, wanted in ((0.0, trees["tuned"]), (1.0, trees["base"])):
    found = merged(settings(method, base_weight=weight), models, tmp_path / f"{weight}")
    for name, value in wanted.items() if weight == 1.0 or method in TO_TUNED else ():
      np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=f"{weight}: {name}")
  if method in LINEAR:
    found = merged(settings(method, base_weight=0.5), models, tmp_path / "half")
    for name, value in trees["base"].items():
      np.testing.assert_allclose(found[name], (value + trees["tuned"][name]) / 2, rtol=0, atol=1e-5, err_msg=name)


def test_a_method_declares_what_the_weight_sets() -> None:
  """Whatever the option is called, and whichever way it counts; a `t` or `alpha` by itself is no strength."""
  config, options = settings("wise_ft", base_weight=0.25), (Option("t", "a threshold"), Option("mix", "the mix"))
  given = {}
  for strength in ("mix", "1 - mix", None):
    changed = dataclasses.replace(registry.METHODS["wise_ft"], options=options, strength=strength)
    with pytest.MonkeyPatch.context() as patch:
      patch.setitem(registry.METHODS, "wise_ft", changed)
      given[strength] = merge_settings.get_settings(config).collect_options(0.25, None)
      assert merge_settings.has_strength("wise_ft") == bool(strength)
      with pytest.raises(UserError, match=r"options\.t: merge\.method=wise_ft needs it"):
        merge_settings.check_merge_options(config)
  assert given == {"mix": {"mix": 0.75}, "1 - mix": {"mix": 0.25}, None: {}}


@pytest.mark.parametrize("method", [
    name for name in METHODS if name not in MEANS and "importance" not in registry.METHODS[name].by_option
    and registry.METHODS[name].min_models == 1])
def test_library_names_strengthless_methods(
    method: str, models: merge.MergeInputs, trees: dict[str, dict[str, np.ndarray]], tmp_path: Path) -> None:
  """Methods without a strength are those of the library."""
  config = settings(method, base_weight=0.25)
  found = merged(config, models, tmp_path / "out")
  base, tuned = trees["base"], trees["tuned"]
  inputs = {("base", "other"): [base, tuned], ("base", "models"): [base, [tuned]]}.get(
      registry.METHODS[method].inputs, [[base, tuned]])
  options = merge_settings.get_settings(config).collect_options(0.25, None)
  for name, value in getattr(merging, method)(*inputs, **options).items():
    np.testing.assert_allclose(found[name], np.asarray(value), rtol=0, atol=1e-6, err_msg=name)


def test_layers_have_weights_of_their_own(models: merge.MergeInputs, trees: dict[str, dict[str, np.ndarray]],
                                          tmp_path: Path) -> None:
  for method in ("linear", "task_arithmetic", "wise_ft"):
    found = merged(settings(method, base_weight=(1.0, 0.0)), models, tmp_path / method)
    for layer, weight in enumerate((1.0, 0.5, 0.0)):
      name = f"model.layers.{layer}.mlp.up_proj.weight"
      wanted = weight * trees["base"][name] + (1 - weight) * trees["tuned"][name]
      np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6)


def test_lines_is_linear_in_depth(models: merge.MergeInputs, trees: dict[str, dict[str, np.ndarray]],
                                  tmp_path: Path) -> None:
  """alpha + beta (l - 1) / (L - 1) of layer l (arXiv 2410.17146, eq. 3), times 1 - base_weight."""
  config = settings("", base_weight=0.5)
  config.method = "lines"
  found = merged(config, models, tmp_path / "out")
  for layer, factor in enumerate((0.5, 0.75, 1.0)):
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    wanted = trees["base"][name] + 0.5 * factor * (trees["tuned"][name] - trees["base"][name])
    np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6)


def test_model_stock_merges_the_rounds_so_far(models: merge.MergeInputs, trees: dict[str, dict[str, np.ndarray]],
                                              tmp_path: Path) -> None:
  config = settings("model_stock")
  first = merged(config, models, tmp_path / "first")  # one model is no stock: it is handed on
  for name, value in trees["tuned"].items():
    np.testing.assert_array_equal(first[name], value)
  several = models._replace(tuned=[models.start, *models.tuned])
  found = merged(config, several, tmp_path / "second")
  for name, value in merging.model_stock(trees["base"], [trees["start"], trees["tuned"]]).items():
    np.testing.assert_allclose(found[name], np.asarray(value), rtol=0, atol=1e-6, err_msg=name)
  run = Run(config, Path("run"), Checkpoint(Path("base"), "base"))
  stages = {s.name: s for s in loop.plan(run)}
  assert stages["round_0/merged"].plan == "the tuned model, for model_stock merges several"
  assert {"round_0/sft", "round_1/sft", "round_2/sft"} < {*stages["round_2/merged"].needs}


def test_masks_follow_seed_and_round(models: merge.MergeInputs, tmp_path: Path) -> None:
  config = settings("dare_linear", drop_rate=0.5, base_weight=0.0)
  outs = []
  for i, (seed, round_) in enumerate(((0, 0), (0, 0), (0, 1), (1, 0))):
    config.seed = seed
    merge.merge(config, models, round_, None, tmp_path / f"{i}")
    outs.append(read(tmp_path / f"{i}")["model.embed_tokens.weight"])
  assert (outs[0] == outs[1]).all()
  assert (outs[0] != outs[2]).any()
  assert (outs[0] != outs[3]).any()
  keys = jax.random.fold_in(jax.random.key(0), 0)
  expected = merging.dare_linear(read(models.base), [read(models.tuned[0])], weights=1.0, densities=0.5, key=keys)
  np.testing.assert_allclose(outs[0], np.asarray(expected["model.embed_tokens.weight"]), rtol=0, atol=1e-6)


def test_the_docs_list_every_method() -> None:
  page = (REPO / "docs/methods.md").read_text()
  for name, method in methods.METHODS.items():
    assert f"| `{name}` | {method.summary} | {method.source} |" in page.replace(r"\|", "|")


def test_every_option_has_its_place_in_the_config() -> None:
  taken = {option.name for name in METHODS for option in registry.METHODS[name].options}
  assert {*common.get_config().merge.options} == taken - {"base_weight", "drop_rate", "importance"}


@pytest.mark.parametrize(("given", "message"), [
    ({"merge.method": "tys"}, "did you mean ties"),
    ({"merge.method": "fisher"}, "is not for rounds; expected one of: arcee_fusion, "),
    ({"merge.method": "ties", "merge.options.densities": 2.0}, r"densities=2\.0: expected 0 <= densities <= 1"),
    ({"merge.method": "ties", "merge.options.scope": "all"}, "expected 'tensor' or 'model'"),
    ({"merge.method": "nearswap"}, r"options\.t: merge\.method=nearswap needs it"),
    ({"merge.options.scale": 2.0}, "is no option of imm, which takes none here; it has config.merge.base_weight and "
     r"config\.merge\.drop_rate$"),
    ({"merge.method": "ties", "merge.options.t": 0.1}, "is no option of ties; expected one of"),
    ({"merge.method": "ties", "merge.options.densities": (0.3, 0.2)}, "expected a number, or 1 of them, for the tuned"),
    ({"merge.method": "linear", "merge.options.weights": (1, 2, 3)}, "or 2 of them, for the base and the tuned one"),
    ({"merge.method": "karcher", "merge.options.tol": (0.1, 0.2)}, r"tol=\(0\.1, 0\.2\): expected 0 <= tol"),
    ({"method": "star", "merge.method": "ties"}, "method=star merges nothing"),
    ({"method": "star", "merge.options.scale": 2.0}, "method=star merges nothing"),
    ({"merge.method": "karcher", "merge.sweep": (0.1,)}, "has no weight of the base")])
def test_impossible_merges_are_found_early(given: dict, message: str) -> None:
  """What cannot be merged is said before the run."""
  config = tiny.get_config()
  config.update_from_flattened_dict(given)
  with pytest.raises(UserError, match=message):
    config_checks.validate(config, trains=False)


@pytest.mark.parametrize(("method", "start", "needs"), [
    ("rest_em", "base", []), ("wise_ft", "round_0/sft", ["round_1/merged"]), ("lines", "round_0/merged", [])])
def test_what_a_method_starts_from(method: str, start: str, needs: list[str]) -> None:
  config = tiny.get_config()
  config.method, config.rounds = method, 2
  stages = {s.name: s for s in loop.plan(Run(config, Path("run"), Checkpoint(Path("base"), "base")))}
  assert stages["round_1/sft"].needs[0] == start
  assert stages["round_1/samples.jsonl"].needs[0] == ("round_0/sft" if method != "lines" else start)
  assert {*needs} <= stages.keys()


@pytest.mark.parametrize("given", [
    {"merge.method": "slerp", "merge.options.t": 0.3}, {"merge.method": "linear", "merge.options.weights": (0.2, 0.8)},
    {"merge.method": "ties", "merge.options.weights": 0.4}, {"merge.method": "ties", "merge.options.normalize": True},
    {"merge.method": "wise_ft", "merge.options.alpha": 0.4}])
def test_overridden_weight_is_not_swept(given: dict, models: merge.MergeInputs, tmp_path: Path) -> None:
  """A weight that an option overrides is neither swept nor recorded."""
  outs = []
  for weight in (0.2, 0.9):
    config = tiny.get_config()
    config.update_from_flattened_dict({**given, "merge.drop_rate": 0.0, "merge.base_weight": weight})
    config_checks.validate(config, trains=False)
    assert merge.merge(config, models, 0, None, tmp_path / f"{weight}") == {"method": config.merge.method}
    outs.append(read(tmp_path / f"{weight}"))
  for name, value in outs[0].items():
    np.testing.assert_array_equal(outs[1][name], value)  # so that a sweep would say of equal models that they differ
  for more in ({"merge.sweep": (0.2, 0.8)}, {"merge.base_weight": "auto"}):
    config = tiny.get_config()
    config.update_from_flattened_dict(given | more)
    with pytest.raises(UserError, match=r"config\.merge\.options\.\w+: overrides base_weight"):
      config_checks.validate(config, trains=False)


@pytest.mark.parametrize(("given", "said"), [
    ({}, "base_weight 0.4, drop_rate 0.2"),
    ({"merge.method": "ties"}, "ties, base_weight 0.4 (weights 0.6), drop_rate 0.2 (densities 0.8)"),
    ({"merge.method": "ties", "merge.options.densities": 0.3}, "ties, base_weight 0.4 (weights 0.6), densities 0.3"),
    ({"merge.method": "linear"}, "linear, base_weight 0.4 (weights [0.4, 0.6])"),
    ({"merge.method": "slerp", "merge.base_weight": 0.9}, "slerp, base_weight 0.9 (t 0.1)"),
    ({"merge.method": "wise_ft", "merge.base_weight": {"mlp": 0.4, "": 1.0}},
     "wise_ft, base_weight {'mlp': 0.4, '': 1.0} (alpha {'mlp': 0.6, '': 0})"),
    ({"merge.method": "wise_ft", "merge.base_weight": "auto"}, "wise_ft, base_weight auto (alpha 1 - base_weight)"),
    ({"merge.method": "linear", "merge.options.weights": (0.2, 0.8)}, "linear, weights (0.2, 0.8)"),
    ({"merge.method": "sce"}, "sce"), ({"method": "lines"}, "base_weight 0.4 (weights 0.6)"),
    ({"merge.base_weight": [0.1, 0.2]}, "base_weight [0.1, 0.2] interpolated to 4 layers, drop_rate 0.2"),
    ({"merge.base_weight": [0.1, 0.2, 0.3, 0.4]}, "base_weight [0.1, 0.2, 0.3, 0.4], drop_rate 0.2")])
def test_the_plan_says_what_decides_a_merge(given: dict, said: str) -> None:
  config = tiny.get_config()
  config.update_from_flattened_dict(given)
  stages = {s.name: s for s in loop.plan(Run(config, Path("run"), Checkpoint(Path("base"), "base")))}
  assert stages["round_0/merged"].plan == said


def test_round_without_answers_merges(
    models: merge.MergeInputs, trees: dict[str, dict[str, np.ndarray]], tmp_path: Path) -> None:
  """wise_ft's last model is star's merged with the base, and star's last one is then what the round started from."""
  (tmp_path / "train.jsonl").touch()
  empty = models._replace(tuned=[models.start], train=tmp_path / "train.jsonl")
  for method, share in (("wise_ft", 0.25), ("lines", 1.0)):
    config = settings("", base_weight=0.75)
    config.method = method
    found = merged(config, empty, tmp_path / method)
    for name, base in trees["base"].items():
      np.testing.assert_allclose(found[name], base + share * (trees["start"][name] - base), rtol=0, atol=1e-6)
