"""What a model's layers do for a data set, how training changes them, and how diverse its answers are."""

from collections.abc import Sequence

# The weights of a layer that eq. 2 to 4 sum over, and the block that holds each.
MODULES = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
           "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
# Of layer importance: eq. 3 and eq. 2.
ORDERS = (1, 2)


def shares(values: Sequence[float]) -> list[float]:
  """Each value's share of their sum.

  >>> shares([1.0, 3.0]), shares([0.0])
  ([0.25, 0.75], [0.0])
  """
  whole = sum(values)
  return [value / whole if whole else 0.0 for value in values]
