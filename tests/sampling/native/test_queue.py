"""Packing of prompts: each prompt is packed whole and once, with little padding."""

import numpy as np
import pytest

from imm_jax.sampling.native import queue


@pytest.mark.parametrize("parts", [1, 3])
def test_prompts_are_packed_once(parts: int) -> None:
  """There is little padding."""
  rng = np.random.default_rng(0)
  # GSM8K's questions have 76 tokens on average, and at most 148.
  ids = [rng.integers(1, 1000, n).tolist() for n in np.clip(rng.normal(76, 26, 200), 20, 148).astype(int)]
  shape = queue.pack_shape(list(map(len, ids)), parts=parts)
  packs, samples = [], [queue.Sample(i, s, str(i), 0.0) for i in range(200) for s in range(2)]
  waiting = queue.Queue(dict(enumerate(ids)), samples, shape, lambda pack: packs.append(pack) or (None, []),
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


def test_common_prefix_leaves_a_token() -> None:
  """Each prompt keeps one at least."""
  same = [list(range(30))] * 3
  assert queue.common_prefix(same, 3) == 29
  assert queue.common_prefix(same[:1], 4) == 29  # one prompt, several samples
  assert queue.common_prefix(same[:1], 1) == 0
  assert queue.common_prefix([[*range(20), 7], [*range(20)]], 2) == 19
  assert queue.common_prefix([], 0) == 0


@pytest.mark.parametrize(("prefixes", "expected"), [
    ([200, 200, 0], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]),  # two sets of examples, and prompts without
    ([200, 200, 200], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]),
    ([40, 40, 40], [[*range(12)]]),  # too short to be worth three groups
], ids=["two-and-others", "three", "short"])
def test_prompts_that_begin_alike_are_a_group(prefixes: list[int], expected: list[list[int]]) -> None:
  rng = np.random.default_rng(0)
  begin = [rng.integers(1, 1000, size).tolist() for size in prefixes]
  ids = [begin[i % 3] + rng.integers(1, 1000, 30).tolist() for i in range(12)]
  assert queue.group_by_prefix(ids, least=4) == expected
  assert queue.group_by_prefix(ids, least=5) == [[*range(12)]]
  assert queue.group_by_prefix([*ids, [3, 4]], least=4)[-1][-1] == 12
  same = [begin[0] + tail[-30:] for tail in ids]
  assert queue.group_by_prefix(same, least=4) == [[*range(12)]]


@pytest.mark.parametrize("count", [32, 128, 1319])
def test_packs_of_accelerators_have_little_padding(count: int) -> None:
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.normal(76, 26, count), 20, 148).astype(int).tolist()
  packs: list[queue.Pack] = []
  waiting = queue.Queue({i: [1] * n for i, n in enumerate(lengths)},
                        [queue.Sample(i, 0, str(i), 0.0) for i in range(count)], queue.pack_shape(lengths, cpu=False),
                        lambda pack: packs.append(pack) or (None, []))
  while waiting:
    waiting.take(64)
  assert sum(pack.tokens.size for pack in packs) < (1.35 if count == 32 else 1.15) * sum(lengths)
