"""Packing of prompts: each prompt is packed whole and once, with little padding."""

import numpy as np
import pytest

from imm_jax.sampling.native import queue


@pytest.mark.parametrize("parts", [1, 3])
def test_every_prompt_is_packed_once_with_little_padding(parts: int) -> None:
  rng = np.random.default_rng(0)
  # GSM8K's questions have 76 tokens on average, and at most 148.
  ids = [rng.integers(1, 1000, n).tolist() for n in np.clip(rng.normal(76, 26, 200), 20, 148).astype(int)]
  shape = queue.pack_shape(list(map(len, ids)), parts=parts)
  packs, samples = [], [queue.Sample(i, s, str(i), 0.0) for i in range(200) for s in range(2)]
  waiting = queue.Queue(ids, samples, shape, lambda pack: packs.append(pack) or (None, []),
                        parts=parts)
  taken = []
  while waiting:
    joining, run = waiting.take(7)
    for place, sample in joining:
      begin, length = run.pack.starts[place], run.pack.lengths[place]
      assert run.pack.tokens.ravel()[begin:begin + length].tolist() == ids[sample.prompt]
      assert run.pack.positions.ravel()[begin:begin + length].tolist() == list(range(length))
      assert len({*run.pack.segment_ids.ravel()[begin:begin + length].tolist()}) == 1
      assert run.pack.last[place] == begin + length - 1
      taken.append(sample)
  assert sorted(taken) == samples
  assert len({pack.tokens.shape for pack in packs}) <= 3
  assert all(pack.tokens.shape[0] % parts == 0 for pack in packs)
  assert sum(pack.tokens.size for pack in packs) < 1.15 * sum(map(len, ids))


def test_the_common_prefix_leaves_each_prompt_a_token() -> None:
  same = [list(range(30))] * 3
  assert queue.common_prefix(same, 3) == 29
  assert queue.common_prefix(same[:1], 4) == 29  # one prompt, several samples
  assert queue.common_prefix(same[:1], 1) == 0
  assert queue.common_prefix([[*range(20), 7], [*range(20)]], 2) == 19
  assert queue.common_prefix([], 0) == 0
