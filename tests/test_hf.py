"""Checkpoint folders and the safetensors format, against transformers and the safetensors library."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors as library
import safetensors.numpy as library_numpy
import transformers
from hypothesis import given, settings, strategies as st

from imm_jax.errors import UserError
from imm_jax.model import hf, hub, safetensors

torch = pytest.importorskip("torch")

TINY = hub.resolve("tiny")
Q0, UP1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def _stored(folder: Path) -> dict[str, dict[str, Any]]:
  """Name -> dtype, shape and bytes of all tensors of a folder, as the library reads them."""
  tensors = {}
  for file in sorted(folder.glob("*.safetensors")):
    tensors.update(library.deserialize(file.read_bytes()))
  return tensors


def _file(header: Any, data: bytes = b"") -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


def _edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
  tensors = library_numpy.load_file(folder / "model.safetensors")
  change(tensors)
  library_numpy.save_file(tensors, folder / "model.safetensors")


def _refusal(folder: Path) -> str:
  """The one line with which loading or checking this folder is refused."""
  with pytest.raises(UserError) as error:
    hf.load(folder)
  with pytest.raises(UserError) as checked:
    hf.check(folder)
  assert str(checked.value) == str(error.value)
  assert "\n" not in str(error.value)
  assert str(error.value).startswith(str(folder))
  return str(error.value)


@pytest.mark.parametrize("shard", [None, 20_000], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["qwen2-tied", "llama"])
def test_a_loaded_and_saved_checkpoint_is_the_same_to_the_byte(
    checkpoint, tmp_path: Path, kind: str, dtype: torch.dtype, shard: int | None) -> None:
  _, folder = checkpoint(kind, dtype=dtype)
  options = {} if shard is None else {"max_shard_bytes": shard}
  first, second = tmp_path / "first", tmp_path / "second"
  hf.save(hf.load(folder)[1], first, like=folder, **options)
  assert _stored(first) == _stored(folder)
  hf.save(hf.load(first)[1], second, like=first, **options)
  files = {f.name: f.read_bytes() for f in first.iterdir()}
  assert files == {f.name: f.read_bytes() for f in second.iterdir()}
  assert sum(name.endswith(".safetensors") for name in files) == 1 if shard is None else len(files) > 4


def test_shards_hold_at_most_their_size_and_the_index_says_where_tensors_are(checkpoint, tmp_path: Path) -> None:
  _, folder = checkpoint("qwen2-untied")
  hf.save(hf.load(folder)[1], tmp_path / "out", max_shard_bytes=20_000)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  weight_map, total = {}, 0
  for file in sorted((tmp_path / "out").glob("*.safetensors")):
    sizes = {name: len(t["data"]) for name, t in library.deserialize(file.read_bytes())}
    assert sum(sizes.values()) <= 20_000
    weight_map.update(dict.fromkeys(sizes, file.name))
    total += sum(sizes.values())
  assert index == {"metadata": {"total_size": total}, "weight_map": weight_map}
  assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_tensor_larger_than_a_shard_has_its_own_file(checkpoint, tmp_path: Path) -> None:
  _, folder = checkpoint("llama")
  hf.save(hf.load(folder)[1], tmp_path / "out", max_shard_bytes=1)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(_stored(folder))
  assert _stored(tmp_path / "out") == _stored(folder)


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama"])
def test_transformers_loads_saved_shards(checkpoint, tmp_path: Path, kind: str) -> None:
  model, folder = checkpoint(kind)
  hf.save(hf.load(folder)[1], tmp_path / "out", like=folder, max_shard_bytes=20_000)
  loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "out", dtype=torch.float32, output_loading_info=True)
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  want, got = model.state_dict(), loaded.state_dict()
  assert got.keys() == want.keys()
  assert all(torch.equal(got[name], want[name]) for name in want)


def test_config_and_tokenizer_files_are_copied_unchanged_and_nothing_else(tmp_path: Path) -> None:
  source, out = tmp_path / "source", tmp_path / "out"
  shutil.copytree(TINY, source)
  extra = {"merges.txt": b"#version\r\na b\r\n", "vocab.json": b"{}", "chat_template.jinja": "é {{x}}".encode()}
  for name, content in {**extra, "optimizer.pt": b"x", "README.md": b"x"}.items():
    (source / name).write_bytes(content)
  hf.save(hf.load(source)[1], out, like=source)
  copied = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", *extra)
  assert {f.name for f in out.iterdir()} == {"model.safetensors", *copied}
  assert all((out / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_layers_are_stacked_in_order_and_place_is_asked_for_every_parameter(checkpoint) -> None:
  model, folder = checkpoint("llama")
  seen, device = {}, jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _, params = hf.load(folder, place=lambda path, shape: seen.setdefault(path, shape) and device)
  state = model.state_dict()
  for i in range(2):
    want = state[f"model.layers.{i}.mlp.down_proj.weight"].numpy()
    np.testing.assert_array_equal(params["layers"]["mlp"]["down_proj"]["weight"][i], want)
  assert len(seen) == len(jax.tree.leaves(params)) == 12
  assert seen["lm_head.weight"] == params["lm_head"]["weight"].shape


def test_dtype_converts_every_tensor(checkpoint) -> None:
  _, folder = checkpoint("qwen2-tied")
  stored, converted = hf.load(folder)[1], hf.load(folder, dtype=jnp.bfloat16)[1]
  for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(converted), strict=True):
    assert b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(a).astype(ml_dtypes.bfloat16), np.asarray(b))


def test_a_tied_head_that_is_stored_too_must_equal_the_embedding(checkpoint) -> None:
  _, folder = checkpoint("qwen2-tied")
  want = hf.load(folder)[1]
  _edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), hf.load(folder)[1], want))
  _edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
  assert "lm_head.weight differs" in _refusal(folder)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(checkpoint) -> None:
  _, folder = checkpoint("llama")
  _edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
  hf.load(folder)


def test_missing_files_are_named(checkpoint, tmp_path: Path) -> None:
  assert "no such checkpoint folder" in _refusal(tmp_path / "nowhere")
  _, folder = checkpoint("llama")
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  assert "safe_serialization" in _refusal(folder)
  (folder / "pytorch_model.bin").unlink()
  assert "model.safetensors" in _refusal(folder)
  (folder / "config.json").unlink()
  assert "config.json" in _refusal(folder)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop(Q0), [f"missing {Q0}"]),
    (lambda t: t.update({"model.extra.weight": np.ones(2, np.float32)}), ["unknown model.extra.weight"]),
    (lambda t: t.update({UP1: t[UP1].T.copy()}), [UP1, "(48, 80)", "(80, 48)"]),
    (lambda t: t.update({UP1: t[UP1][0]}), [UP1, "(48,)", "(80, 48)"]),
    (lambda t: t.update({Q0: t[Q0].astype(np.int32)}), [Q0, "int32"]),
    (lambda t: t.update({Q0: t[Q0].astype(np.float64)}), [Q0, "float64", "float32"]),
    (lambda t: t.update({UP1: t[UP1].astype(np.float16)}), [UP1, "float16", "one dtype for all layers"]),
    (lambda t: (t.pop(Q0), t.pop("lm_head.weight")), [f"missing {Q0}", "missing lm_head.weight"]),
], ids=["missing", "unknown", "transposed", "too-few-axes", "integers", "float64",
        "mixed-dtypes", "all-problems"])
def test_tensors_that_do_not_fit_the_config_are_named(
    checkpoint, change: Callable[[dict[str, np.ndarray]], Any], words: list[str]) -> None:
  _, folder = checkpoint("llama")
  _edit(folder, change)
  message = _refusal(folder)
  assert all(word in message for word in words), message


def test_a_long_list_of_problems_is_cut(checkpoint) -> None:
  _, folder = checkpoint("llama")
  _edit(folder, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name])
  assert _refusal(folder).endswith(" and 1 more")


@pytest.mark.parametrize(("damage", "words"), [
    (lambda b: b[:-1], "truncated"),
    (lambda b: b[:len(b) // 2], "truncated"),
    (lambda b: b[:100], "not a whole safetensors file"),
    (lambda b: b[:5], "not a whole safetensors file"),
    (lambda b: b"", "not a whole safetensors file"),
    (lambda b: b[:8] + b"x" + b[9:], "header is damaged"),
    (lambda b: b[:9] + b"\xff" + b[10:], "header is damaged"),
    (lambda b: _file([]), "header is damaged"),
    (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not a whole safetensors file"),
], ids=["last-byte", "half", "in-header", "in-prefix", "empty", "not-json", "not-utf8", "not-an-object", "lfs-pointer"])
def test_a_damaged_file_is_named(checkpoint, damage: Callable[[bytes], bytes], words: str) -> None:
  _, folder = checkpoint("llama")
  file = folder / "model.safetensors"
  file.write_bytes(damage(file.read_bytes()))
  message = _refusal(folder)
  assert message.startswith(str(file))
  assert words in message


def test_a_tensor_name_that_stands_twice_in_a_header_is_refused(tmp_path: Path) -> None:
  path = tmp_path / "x.safetensors"
  entry = b'{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
  path.write_bytes(_file(b'{"a":' + entry % (0, 4) + b',"b":' + entry % (4, 8) + b',"a":' + entry % (4, 8) + b"}",
                         bytes(8)))
  with pytest.raises(UserError, match="'a' stands in it twice"):
    safetensors.read(path)


def test_damaged_shards_and_indices_are_named(checkpoint, tmp_path: Path) -> None:
  _, source = checkpoint("llama")
  folder = tmp_path / "sharded"
  hf.save(hf.load(source)[1], folder, like=source, max_shard_bytes=20_000)
  index, shard = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))[1]
  whole = shard.read_bytes()
  shard.unlink()
  assert str(shard) in _refusal(folder)
  shard.write_bytes(whole[:-1])
  assert f"{shard}: truncated" in _refusal(folder)
  # A shard that holds another one's tensors.
  shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], shard)
  assert "stands in" in _refusal(folder)
  for text in ("{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}'):
    index.write_text(text)
    assert _refusal(folder).startswith(str(index))


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


def test_an_array_that_is_not_the_announced_one_is_not_written(tmp_path: Path) -> None:
  for got, words in ((np.zeros(3, np.float32), "announced"), (np.zeros(2, np.float64), "announced"),
                     (np.zeros(1, np.float32), "1 of the entries")):
    with pytest.raises(ValueError, match=words):
      safetensors.write(tmp_path / "x", [("a", np.dtype(np.float32), (2,), lambda got=got: [got])])


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
], ids=lambda header: header.decode()[:60])
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
def test_whatever_its_bytes_a_file_is_read_or_refused_with_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
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
