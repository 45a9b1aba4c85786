"""Estimates of the tokens and the time of a run."""

import pytest

from configs import tiny
from imm_jax.estimates import cost
from imm_jax.model import published
from imm_jax.model.decoder import count_params
from imm_jax.runtime import hardware


def test_the_cost_of_a_run_counts_its_tokens():
  config = tiny.get_config()
  config.rounds, config.method = 2, "data_accumulation"
  found = cost.count_tokens(config, {"stages": {}})
  length = 0.4 * 40
  assert found.sampled == 2 * 1000 * 3 * length
  assert found.trained == pytest.approx((3 * (1 + 2) * 1500 + 2 * 256) * (length + 128))  # and layer importance
  assert found.evaluated == (1 + 2) * 6 * 200 * length
  assert found.eval_prompts == (1 + 2) * 6 * 200 * 128 + 2 * 2 * 6 * 32 * (128 + length)
  record = {"devices": ["cpu"], "stages": {
      "round_0/samples.jsonl": {"seconds": 10.0, "facts": {"samples": 3000, "tokens": 90_000, "correct": 600}},
      "round_0/sft": {"seconds": 5.0, "facts": {"tokens": 100_000}}}}
  found = cost.count_tokens(config, record)
  assert found.sampled == 2 * 1000 * 3 * 30
  assert found.trained == pytest.approx((3 * (1 + 2) * 600 + 2 * 256) * (30 + 128))
  assert found.sample_prompts == 2 * 1000 * 128
  seconds = (found.sampled + found.evaluated) / 9000 + found.trained / 20_000
  assert 60 < seconds < 90
  assert f"about 1 min {seconds - 60:.0f} s at the measured 9 k sampled and 20 k trained tokens/s" in cost.describe(
      config, None, record)
  counted = cost.count_tokens(config, {"stages": {}}, question=50, answer=10)
  assert (counted.sampled, counted.sample_prompts) == (2 * 1000 * 3 * 10, 2 * 1000 * 50)


def test_what_stages_took_stands_for_those_to_come():
  names = ["base/eval", "round_0/sft", "round_0/eval/sft", "round_1/sft", "round_1/eval/sft"]
  record = {"stages": {name: {"seconds": 3600.0 * seconds, "facts": {}} for name, seconds in zip(
      names, (1, 2, 3), strict=False)}}
  assert cost.describe(tiny.get_config(), None, record, stages=names).endswith(
      "about 11 h 0 min by what stages took so far on 1 device(s), 5 h 0 min of it to come")
  del record["stages"]["round_0/eval/sft"]
  assert " by what stages" not in cost.describe(tiny.get_config(), None, record, stages=names)


def test_measured_flops_estimate_the_time(monkeypatch):
  """Where no peak is known, one second of products says how long a run takes."""
  config, model = tiny.get_config(), published.find_config("tiny")
  rates = {config.sample.batch_size: 1e9, 1024: 4e9}
  monkeypatch.setattr(hardware, "measure_flops", lambda rows, dtype: rates[rows])
  found, params = cost.count_tokens(config, {"stages": {}}), count_params(model)
  seconds = (2 * params * (found.sampled + found.evaluated) / 0.5e9
             + params * (8 * found.trained + 2 * (found.sample_prompts + found.eval_prompts)) / 3e9)
  assert 5400 < seconds < 36_000
  minutes = int(seconds // 60)
  assert f"about {minutes // 60} h {minutes % 60} min on this machine" in cost.describe(config, model, {"stages": {}})
