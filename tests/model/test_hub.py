"""Models by name, with a hub in memory."""

import json
from pathlib import Path

import pytest
from huggingface_hub import errors

from imm_jax.errors import Exit, UserError, exit_code
from imm_jax.model import hub, published
from tests.fake_hub import Hub, http_error
from tests.helpers import chain

ID = "someone/some-model-1.5b"
CONFIG = (hub.resolve("tiny") / "config.json").read_bytes()
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDS = {"model.safetensors.index.json": INDEX.encode(), "model-00001-of-00002.safetensors": b"1" * 1_500_000,
          "model-00002-of-00002.safetensors": b"22"}
SIDE = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "generation_config.json": b"{}",
        "chat_template.jinja": b"x", "additional_chat_templates/tool_use.jinja": b"y"}
# What publishers put beside.
OTHERS = {"fp8/config.json": b"{}", "fp8/model.safetensors": b"x", "checkpoint-500/tokenizer.json": b"{}",
          "checkpoint-500/model-00001-of-00002.safetensors": b"x", "model.fp16.safetensors": b"x", "README.md": b"x",
          "consolidated.safetensors": b"x", "original/consolidated.00.pth": b"x", "pytorch_model.bin": b"x",
          "modeling.py": b"x", "additional_chat_templates/README.md": b"x"}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
  return Hub(tmp_path / "cache", monkeypatch)


def _refusal(model: str) -> str:
  with pytest.raises(UserError) as raised:
    hub.resolve(model)
  assert "\n" not in str(raised.value)
  return str(raised.value)


def test_a_folder_and_the_embedded_model_need_no_hub(
    fake: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  fake.raises = AssertionError("asked the hub")
  monkeypatch.chdir(tmp_path)
  for name in (ID, f"{ID}@main", f"{ID}+someone/adapter"):
    Path(name).mkdir(parents=True)
    assert hub.resolve(name) == Path(name)
    assert hub.is_local(name)
  (tmp_path / f"{ID}.txt").touch()
  assert hub.resolve(f"{ID}.txt") == Path(f"{ID}.txt")
  assert (hub.resolve("tiny") / "model.safetensors").exists()
  assert not capsys.readouterr().err


@pytest.mark.parametrize(("name", "meant"), [
    (f"https://huggingface.co/{ID}", ID), (f"https://huggingface.co/{ID}/tree/v1.0", f"{ID}@v1.0"),
    (f"https://hf.co/{ID}/blob/main/config.json", ID), (f"huggingface.co/{ID}/", ID), (f"hf://{ID}", ID),
    (f"{ID} ", ID), (f" {ID}@main", f"{ID}@main"), (f"{ID}@", ID), (f"{ID}/", ID), (f"{ID}:v1", f"{ID}@v1"),
    ("~/models/m", str(Path.home() / "models/m")), ("/no/such/folder", ""), ("/no/such+folder", ""), ("/no/x", ""),
    ("./x", ""), ("gpt2", ""), ("models/of/mine", ""), ("a/b/tree/c/d", "")])
def test_neither_path_nor_id_is_explained(fake: Hub, name: str, meant: str) -> None:
  """A name that is neither a folder nor a model of the hub says what may be meant."""
  fake.raises = AssertionError("asked the hub")
  message = _refusal(name)
  assert message.startswith(f"{name}: no such checkpoint folder; expected a folder with config.json")
  assert message.endswith(f"; did you mean {meant!r}?" if meant else " or org/name@revision")


@pytest.mark.parametrize("name", ["a--b/c..d", "org/-name", "o" * 100 + "/x", "\u00fc/x"])
def test_ids_that_the_hub_cannot_have_are_one_line(name: str) -> None:
  assert f"{name}: no such folder, and no id that the hub can have (" in _refusal(name)
  with pytest.raises(UserError, match="no id that the hub can have"):
    published.find_config(name)


def test_config_comes_before_weights(fake: Hub, capsys: pytest.CaptureFixture[str]) -> None:
  """After it come exactly the files that the index names."""
  fake.add(ID, {**OTHERS, **SHARDS, **SIDE, "config.json": CONFIG})
  assert hub.resolve(ID) == fake.folder(ID)
  first, second, *others = fake.fetched
  assert (first, second) == ("config.json", "model.safetensors.index.json@cmain")
  assert set(others) == {f"{name}@cmain" for name in (SHARDS.keys() | SIDE.keys()) - {"model.safetensors.index.json"}}
  assert f"{ID}: fetching 7 files, 1.4 MiB\n" == capsys.readouterr().err
  # All is there: nothing is fetched and nothing said, with a network and without.
  for fake.offline in (False, True):
    fake.fetched.clear()
    assert hub.resolve(ID) == fake.folder(ID)
    assert not fake.fetched
    assert not capsys.readouterr().err
  # What somebody else left in the cache may be less than the commit has.
  (fake.folder(ID) / "generation_config.json").unlink()
  hub.resolve(ID)
  assert f"note: {ID}: the hub cannot be asked, and the cache holds no generation_config.json; " in (
      capsys.readouterr().err)
  (fake.folder(ID) / "tokenizer.json").unlink()
  assert "(offline; the cache holds its weights, but no tokenizer)" in _refusal(ID)
  (fake.folder(ID) / "model-00002-of-00002.safetensors").unlink()
  assert "the hub cannot be reached (offline; the cache holds only a part of it)" in _refusal(ID)


def test_revision_pins_all_files(fake: Hub) -> None:
  """A revision is asked for, and all files are of its commit."""
  fake.add(ID, {"config.json": CONFIG, "model.safetensors": b"old", "tokenizer.json": b"{}"}, revision="v1.0")
  fake.add(ID, {"config.json": b"{}", "model.safetensors": b"new"})
  model = f"{ID}@v1.0"
  assert not hub.is_local(model)
  assert hub.find_config_folder(model) is None
  assert published.find_config(model) is None
  assert published.find_config("Qwen/Qwen2.5-7B@main").num_layers == 28
  assert (hub.resolve(model) / "model.safetensors").read_bytes() == b"old"
  assert fake.fetched == ["config.json", "model.safetensors@cv1.0", "tokenizer.json@cv1.0"]
  assert hub.find_config_folder(model) == fake.folder(ID, "v1.0")
  assert published.find_config(model).num_layers == json.loads(CONFIG)["num_hidden_layers"]
  assert _refusal(f"{ID}@v2") == (
      f"{ID}@v2: {ID} has no revision 'v2' on the hub; expected a branch, a tag or a commit")


@pytest.mark.parametrize(("files", "expected"), [
    ({"config.json": b'{"model_type": "mamba"}', "model.safetensors": b"x"},
     f"{ID}/config.json: model_type='mamba' is not supported"),
    ({"config.json": CONFIG, "pytorch_model.bin": b"x"},
     f"{ID}: has no model.safetensors on the hub, only a pickle checkpoint (pytorch_model.bin), which is not read"),
    ({"config.json": CONFIG, "training_args.bin": b"x"}, f"{ID}: has no model.safetensors on the hub; take a model"),
    ({"config.json": CONFIG, "model.fp16.safetensors": b"x", "pytorch_model.bin": b"x", "fp8/x.safetensors": b"x"},
     "only model.fp16.safetensors, a name that is not read; if it is the whole model, call it model.safetensors"),
    ({"config.json": CONFIG, "x.Q4.gguf": b"x"}, "has no model.safetensors on the hub, only weights in GGUF (x.Q4"),
    ({"x.Q4.gguf": b"x"}, f"{ID}: has no config.json on the hub, only weights in GGUF (x.Q4.gguf), which are not read"),
    ({"config.json": CONFIG, "model-00001-of-00002.safetensors": b"x"}, "without model.safetensors.index.json; get"),
    ({"config.json": CONFIG, "model.safetensors": b"x", "tokenizer.json": None},
     f"{ID}: has no tokenizer on the hub; expected tokenizer.json or tokenizer.model or vocab.json"),
    ({"config.json": CONFIG, "model.safetensors": b"x", "quantize_config.json": b"{}"},
     f"{ID}: quantize_config.json says that its weights are quantized"),
    ({"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {}}'}, "its weight_map is empty"),
    ({"config.json": CONFIG, "pytorch_model.bin": b"x", "model.safetensors.index.json":
      b'{"weight_map": {"a": "pytorch_model.bin"}}'}, "names 'pytorch_model.bin', which is no safetensors file"),
    ({"config.json": CONFIG, **SHARDS, "model.safetensors": b"x"}, f"{ID}: holds both model.safetensors and"),
    ({"config.json": CONFIG, "model.safetensors.index.json": INDEX.encode()},
     "names model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, which the hub does not hold"),
    ({"config.json": CONFIG, "model.safetensors.index.json": b"{}"}, "has no weight_map"),
    ({"adapter_config.json": b'{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": b"x"},
     f"{ID}: is a LoRA adapter of org/base, not a whole model; give org/base+{ID}"),
    ({"README.md": b"x"}, f"{ID}: has no config.json on the hub; expected a model of transformers")])
def test_unreadable_models_download_nothing(fake: Hub, files: dict[str, bytes], expected: str) -> None:
  """What cannot be read is refused before weights come."""
  fake.add(ID, {name: content for name, content in {"tokenizer.json": b"{}", **files}.items() if content is not None})
  assert expected in _refusal(ID)
  assert not [name for name in fake.fetched if ".safetensors@" in name]


def test_adapter_beside_a_model_is_noted(fake: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  """A line says that the adapter is ignored."""
  fake.add(ID, {"config.json": CONFIG, "model.safetensors": b"x", "adapter_config.json": b"{}",
                "adapter_model.safetensors": b"x", "tokenizer.json": b"{}"})
  note = "holds a whole model and a LoRA adapter; the adapter is ignored\n"
  for _ in range(2):  # once is enough
    assert not (hub.resolve(ID) / "adapter_model.safetensors").exists()
  assert capsys.readouterr().err == f"{ID}: fetching 3 files, 5 bytes\nnote: {ID}: {note}"
  for name in ("config.json", "model.safetensors", "adapter_config.json"):
    (tmp_path / name).write_bytes(b"{}")
  hub.resolve(str(tmp_path))
  assert capsys.readouterr().err == f"note: {tmp_path}: {note}"


@pytest.mark.parametrize(("error", "expected"), [
    (http_error(errors.GatedRepoError), f"is gated; accept its terms at https://huggingface.co/{ID}, run `hf auth"),
    (http_error(errors.RepositoryNotFoundError), "no such folder, and no such model on the hub"),
    (http_error(errors.HfHubHTTPError), f"the hub refuses (refused); try again, or `hf download {ID} --revision=v1"),
    (chain(errors.LocalEntryNotFoundError("none"), http_error(errors.HfHubHTTPError, "429 Too many", 429)),
     "the hub refuses (429 Too many); too much was asked of it: wait, or run `hf auth login`"),
    (errors.LocalEntryNotFoundError("no network\nmore"), "the hub cannot be reached (no network); try again"),
    (ConnectionResetError("peer closed\nmore"), "the hub cannot be reached (peer closed)"),
    (type("RemoteProtocolError", (Exception,), {})("incomplete body"), "the hub cannot be reached (incomplete body)"),
    (OSError(28, "No space left on device", "/x"),
     "the hub's cache: cannot be written (No space left on device /x); make room and start again")])
def test_what_the_hub_refuses_is_one_line(fake: Hub, error: Exception, expected: str) -> None:
  fake.raises = error
  message = _refusal(f"{ID}@v1")
  assert message.startswith(f"{ID}@v1: ")
  assert expected in message
  assert ("cannot be reached" in message) == ("cannot be reached" in expected)
  with pytest.raises(UserError) as raised:
    hub.resolve(f"{ID}@v1")
  later = any(said in expected for said in ("cannot be reached", "429", "No space"))
  assert exit_code(raised.value) == (Exit.RESOURCES if later else Exit.MISTAKE)


def test_base_and_adapter_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  for name in ("a+b/base", "c+d"):
    Path(name).mkdir(parents=True)
  pairs = [("a+b/base", "c+d"), ("org/base@v1", "c+d"), ("a+b/base", "org/adapter@main"), ("tiny", "c+d"),
           ("org/base", "org/adapter")]
  for base, adapter in pairs:
    name = f"{base}+{adapter}"
    assert hub.split_adapter(name) == (base, adapter)
    assert hub.strip_adapter(name) == base
    assert not hub.is_local(name)
  assert published.find_config("tiny+c+d") == published.find_config("tiny")
  assert "no such adapter folder, and no hub id: 'nowhere'" in _refusal("tiny+nowhere")
  assert "no such base model folder, and no hub id: '/nowhere'" in _refusal("/nowhere+c+d")
