"""What devices can do, by the name that jax gives their kind."""

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the first name that occurs in the kind counts.
_PEAK_FLOPS = (
    ("TPU v6", 918e12), ("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12),
    ("TPU v4", 275e12), ("B200", 2250e12), ("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12),
    ("L4", 121e12), ("A10", 125e12))


def peak_flops(kind: str) -> float | None:
  """bfloat16 FLOP/s of a device of this kind, or None where that is not known.

  >>> peak_flops("NVIDIA H200") == 989e12, peak_flops("cpu")
  (True, None)
  """
  return next((flops for name, flops in _PEAK_FLOPS if name.lower() in kind.lower()), None)
