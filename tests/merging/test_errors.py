"""Trees, options and names that cannot be merged are errors that name what is wrong."""

import math

import jax
import numpy as np
import pytest

from imm_jax import merging

KEY = jax.random.key(3)


def merge(base, start, tuned, **options):
  return merging.imm(base, start, tuned, **{"base_weight": 0.5, "drop_rate": 0.2, "key": KEY, **options})


def test_mismatched_trees_are_named_by_path():
  base = {"a": np.zeros(2, np.float32), "b": {"c": np.zeros((2, 3), np.float32), "d": np.zeros(4, np.float32)}}
  start = {"a": np.zeros(2, np.float32), "b": {"c": np.zeros((3, 2), np.float32)}, "e": np.zeros(1, np.float32)}
  tuned = {"b": {"c": np.zeros((2, 3), np.float32), "d": np.zeros((), np.float32)}}
  with pytest.raises(ValueError, match="do not match") as e:
    merge(base, start, tuned)
  for problem in ("start lacks b.d", "start has e, base has not", "b.c is (2, 3) in base, (3, 2) in start",
                  "tuned lacks a", "b.d is (4,) in base, () in tuned"):
    assert problem in str(e.value)


def test_broadcastable_shapes_do_not_match():
  """Trees of equal size whose leaves would broadcast are refused."""
  with pytest.raises(ValueError, match=r"w is \(2, 3\) in base, \(1, 3\) in tuned"):
    merge({"w": np.zeros((2, 3))}, {"w": np.zeros((2, 3))}, {"w": np.zeros((1, 3))})


@pytest.mark.parametrize("drop_rate", [1.0, 0.999999, -0.1, -1e-9, 1.5, math.nan, math.inf, -math.inf])
def test_a_drop_rate_out_of_range_is_an_error(drop_rate):
  ones = {"w": np.ones(2, np.float32)}
  for call in (lambda: merging.dare(ones, drop_rate=drop_rate, key=KEY),
               lambda: merge(ones, ones, ones, drop_rate=drop_rate), lambda: merging.quantize_drop_rate(drop_rate)):
    with pytest.raises(ValueError, match=r"drop_rate=.*expected (0 <= drop_rate < 1|a finite number)"):
      call()


@pytest.mark.parametrize("base_weight", [-0.1, 1.0001, math.nan, math.inf, -math.inf])
def test_a_base_weight_out_of_range_is_an_error(base_weight):
  ones = {"w": np.ones(2, np.float32)}
  with pytest.raises(ValueError, match=r"base_weight=.*expected (0 <= base_weight <= 1|a finite number)"):
    merge(ones, ones, ones, base_weight=base_weight)


def test_a_number_beyond_float32_is_none(recwarn: pytest.WarningsRecorder):
  ones = {"w": np.ones(2, np.float32)}
  for weights in (1e39, [1.0, -1e39], np.float64(1e300)):
    with pytest.raises(ValueError, match=r"weights=-?1e\+\d+.* at 'w': expected a finite number \(of float32\)"):
      merging.linear([ones, ones], weights=weights)
  assert not recwarn.list


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "start", "tuned"])
def test_mixed_floating_leaves_are_refused(which, dtype):
  """A leaf that is floating in one model only is an error."""
  trees = [{"w": np.ones((2, 2), np.float32), "steps": np.ones(2, dtype if i == which else np.float32)}
           for i in range(3)]
  with pytest.raises(ValueError, match=r"steps is (float32 in base, (int32|bool)|(int32|bool) in base, float32)"):
    merge(*trees)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_integer_leaves_must_be_equal(dtype):
  """Leaves that are not floating must be the same in all models, and are copied."""
  trees = [{"w": np.full(2, i, np.float32), "ids": np.array([1, 0], dtype)} for i in range(3)]
  assert merge(*trees)["ids"].tolist() == trees[0]["ids"].tolist()
  trees[2]["ids"] = np.array([1, 1], dtype)
  with pytest.raises(ValueError, match=r"ids of (int32|bool) differs between base and tuned"):
    merge(*trees)


@pytest.mark.parametrize("importance", [
    [], [0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [[1.0, 1.0]], 1.0])
def test_importance_must_be_valid(importance):
  """It has to be one finite score for each layer, with a positive sum."""
  ones = {"w": np.ones(2, np.float32)}
  with pytest.raises(ValueError, match="importance: expected one finite score >= 0"):
    merging.iimm(ones, ones, ones, base_weight=0.5, drop_rate=0.0, importance=importance, key=KEY,
                 names={"w": "layers.0.w"})


def test_a_layer_without_an_importance_is_an_error():
  stack = {"w": np.ones((3, 2), np.float32)}
  with pytest.raises(ValueError, match=r"importance has 2 scores, but the names have 3 layers"):
    merging.iimm(stack, stack, stack, base_weight=0.5, drop_rate=0.0, importance=[1.0, 1.0], key=KEY,
                 names={"w": tuple(f"model.layers.{i}.w" for i in range(3))})


@pytest.mark.parametrize("names", [
    ("a", "b"), ("a", "b", "c", "d"), ()])
def test_a_wrong_number_of_names_is_an_error(names):
  stack = {"w": np.ones((3, 2), np.float32)}
  for call in (lambda: merging.dare(stack, drop_rate=0.5, key=KEY, names={"w": names}),
               lambda: merge(stack, stack, stack, names={"w": names})):
    with pytest.raises(ValueError, match=f"{len(names)} names for a leaf of shape"):
      call()


@pytest.mark.parametrize("names", [{}, {"v": "w"}, {"w": "w", "v": "v"}])
def test_names_of_another_tree_are_an_error(names):
  ones = {"w": np.ones(2, np.float32)}
  with pytest.raises(ValueError):  # noqa: PT011 (the message is jax's own)
    merge(ones, ones, ones, names=names)


def test_a_list_in_place_of_a_tree_is_an_error():
  """Lists are trees too, but not beside other trees."""
  ones = {"w": np.ones(2, np.float32)}
  with pytest.raises(ValueError, match=r"^other: expected a tree as base is, got a list$"):
    merging.slerp(ones, [ones], t=0.5)
  assert merging.slerp([ones], [ones], t=0.5)[0]["w"].tolist() == [1, 1]
