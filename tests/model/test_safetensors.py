"""The safetensors format, against the safetensors library."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as library_numpy
from hypothesis import given, settings, strategies as st

from imm_jax.errors import UserError
from imm_jax.model import safetensors


def _file(header: Any, data: bytes = b"") -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


_ARRAYS = {
    "f64": np.array([np.pi, np.nan, -0.0]),
    "f32": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
    "f16": np.array([65504, 6e-8], np.float16),
    "bf16": np.array([[1.5, -3e38]], ml_dtypes.bfloat16),
    "i64": np.array([-2**63, 2**63 - 1]),
    "i32": np.array([-1], np.int32),
    "i16": np.array([-1, 2], np.int16),
    "i8": np.array([-128, 127, 0], np.int8),
    "u8": np.array([255], np.uint8),
    "bool": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "strided": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    'é "quoted"': np.ones(1, np.float32),
}


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
  safetensors.write(path, [(name, a.dtype, a.shape, lambda a=a: [a]) for name, a in arrays.items()])


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
  _write(tmp_path / "x.safetensors", _ARRAYS)
  read = library_numpy.load_file(tmp_path / "x.safetensors")
  assert read.keys() == _ARRAYS.keys()
  for name, want in _ARRAYS.items():
    assert read[name].dtype == want.dtype
    assert read[name].shape == want.shape
    assert read[name].tobytes() == want.tobytes()


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
  arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in _ARRAYS.items()}
  library_numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
  read = safetensors.read(tmp_path / "x.safetensors")
  assert read.keys() == arrays.keys()
  for name, want in arrays.items():
    assert (read[name].dtype, read[name].shape) == (want.dtype, want.shape)
    assert read[name].tobytes() == want.tobytes()


def test_written_data_is_aligned_to_eight_bytes(tmp_path: Path) -> None:
  for length in range(1, 9):
    _write(tmp_path / "x.safetensors", {"a" * length: np.zeros(1)})
    assert struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])[0] % 8 == 0


def test_only_announced_arrays_are_written(tmp_path: Path) -> None:
  """An array that is not the announced one is not written."""
  for got, words in ((np.zeros(3, np.float32), "announced"), (np.zeros(2, np.float64), "announced"),
                     (np.zeros(1, np.float32), "1 of the entries")):
    with pytest.raises(ValueError, match=words):
      safetensors.write(tmp_path / "x", [("a", np.dtype(np.float32), (2,), lambda got=got: [got])])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "C64"])
def test_unknown_dtype_is_named(tmp_path: Path, dtype: str) -> None:
  """The message lists the dtypes that weights may have."""
  path = tmp_path / "x.safetensors"
  path.write_bytes(_file({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}, bytes(4)))
  with pytest.raises(UserError, match=f"'a' has dtype {dtype}.* expected weights in BF16, F16 or F32"):
    safetensors.read(path)


def test_repeated_name_in_header_is_refused(tmp_path: Path) -> None:
  """No tensor may stand twice in a header."""
  path = tmp_path / "x.safetensors"
  entry = b'{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
  path.write_bytes(_file(b'{"a":' + entry % (0, 4) + b',"b":' + entry % (4, 8) + b',"a":' + entry % (4, 8) + b"}",
                         bytes(8)))
  with pytest.raises(UserError, match="'a' is duplicated"):
    safetensors.read(path)


@pytest.mark.parametrize("header", [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a":' + b"1" * 5000 + b"}",
    b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}',
    b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-' + b"9" * 4300 + b"," + b"9" * 4300 + b"]}}",
    b'{"a":{"dtype":"F32","shape":[0,1e30],"data_offsets":[0,0]}}',
    b'{"a":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}',
    b'{"a":{"dtype":"F32","shape":[' + b",".join([b"1"] * 65) + b'],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}',
    b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}',
    b'{"a":{"shape":[1],"data_offsets":[0,4]}}',
    b'{"a":[]}',
    b'{"\\n":null}',
    b'{"\\ud800":null}',
], ids=lambda header: header.decode()[:50].replace("\\", ""))
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: bytes) -> None:
  path = tmp_path / "x.safetensors"
  path.write_bytes(_file(header, bytes(8)))
  with pytest.raises(UserError) as error:
    safetensors.read(path)
  assert str(error.value).startswith(str(path))
  assert "\n" not in str(error.value)


# Bytes that resemble a safetensors file more and more.
_NUMBERS = st.one_of(st.integers(-1, 4), st.sampled_from([0.5, 1e300, float("inf"), float("nan"), True, 2**62, 10**30]))
_JSON = st.recursive(st.one_of(st.none(), _NUMBERS, st.text(max_size=4)),
                     lambda inner: st.one_of(st.lists(inner, max_size=4),
                                             st.dictionaries(st.text(max_size=4), inner, max_size=4)), max_leaves=8)
_VALID = library_numpy.save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)})


@st.composite
def _entries(draw: st.DrawFn) -> Any:
  """A header entry, mostly with offsets that fit its shape."""
  shape, begin = draw(st.lists(_NUMBERS, max_size=4)), draw(st.integers(-1, 9))
  end = draw(st.one_of(st.just(begin + math.prod(shape)), _NUMBERS))
  entry = {"dtype": draw(st.sampled_from(["BOOL", "I8", "U8", "F32"])), "shape": shape, "data_offsets": [begin, end]}
  return {**entry, draw(st.sampled_from(sorted(entry))): draw(_JSON)} if draw(st.integers(0, 3)) == 0 else entry


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
  """A valid file with bytes changed, put in or taken out."""
  content = bytearray(_VALID)
  for _ in range(draw(st.integers(1, 3))):
    begin = draw(st.integers(0, len(content)))
    content[begin:begin + draw(st.integers(0, 3))] = draw(st.one_of(
        st.binary(max_size=3), st.sampled_from([b"0", b"9", b"-", b"e99", b"e999", b'"', b",", b"[", b"}", b"null"])))
  return bytes(content)


_CONTENTS = st.one_of(
    st.binary(max_size=64),
    _mutated(),
    st.builds(_file, st.one_of(st.binary(max_size=32), _JSON), st.binary(max_size=16)),
    st.builds(_file, st.dictionaries(st.text(max_size=4), _entries(), min_size=1, max_size=2), st.binary(max_size=16)))


@settings(derandomize=True, database=None, deadline=None, max_examples=500)
@given(content=_CONTENTS)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
  """Whatever its bytes, a file is read or refused with a `UserError`."""
  path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
  path.write_bytes(content)
  try:
    tensors = safetensors.read(path)
  except UserError as e:
    tensors, message = {}, str(e)
  else:
    message = str(path)
  assert message.startswith(str(path))
  assert "\n" not in message
  assert all(t.tobytes() in content for t in tensors.values())
