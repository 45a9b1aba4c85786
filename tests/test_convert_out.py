"""What the conversion may write and replace, and how it refuses the rest."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from imm_jax import convert, files
from imm_jax.errors import UserError
from imm_jax.model import safetensors
from tests import TINY
from tests.helpers import run_convert


def _refusal(**values: object) -> str:
  with pytest.raises(UserError) as error:
    run_convert(**values)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The embedded model as orbax."""
  out = tmp_path_factory.mktemp("converted") / "orbax"
  convert.to_orbax(TINY, out)
  return out


@pytest.fixture
def source(tmp_path: Path) -> Path:
  """A checkpoint folder of one's own, in a folder with other work."""
  (tmp_path / "work").mkdir()
  (tmp_path / "work/notes.txt").write_text("mine")
  return shutil.copytree(TINY, tmp_path / "work/source")


def _contents(root: Path) -> dict[str, bytes]:
  return {str(path.relative_to(root)): path.read_bytes() for path in files.list_files(root)}


@pytest.mark.parametrize("out", ["work/source", "work", "work/source/out", "work/../work/source", "link"])
def test_source_is_never_replaced(source: Path, tmp_path: Path, out: str) -> None:
  """Nor is what holds it."""
  (tmp_path / "link").symlink_to(source)
  before = _contents(tmp_path)
  message = _refusal(source=source, out=tmp_path / out, to="orbax", overwrite=True)
  assert "the input --source" in message
  assert _contents(tmp_path) == before


def test_only_what_a_conversion_wrote_is_replaced(source: Path, orbax: Path, tmp_path: Path) -> None:
  out = tmp_path / "out"
  shutil.copytree(source.parent, out)
  assert "is no checkpoint, so it is not replaced" in _refusal(source=source, out=out, to="orbax", overwrite=True)
  assert (out / "notes.txt").read_text() == "mine"
  shutil.rmtree(out)
  shutil.copytree(source, out)
  (out / "thesis.tex").write_text("mine")
  (out / "recipe.json").unlink()
  message = _refusal(source=orbax, out=out, to="hf", overwrite=True)
  assert "holds thesis.tex, which no conversion writes, so it is not replaced" in message
  (out / "thesis.tex").unlink()
  assert "exists; give another folder, or --overwrite" in _refusal(source=orbax, out=out, to="hf")
  for to, read in (("hf", orbax), ("orbax", source), ("orbax", source), ("hf", orbax)):
    run_convert(source=read, out=out, to=to, overwrite=True)
    assert (out / "params").is_dir() == (to == "orbax")
  before, after = (safetensors.read(folder / "model.safetensors") for folder in (source, out))
  assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("out", [".", "..", "../here", "/"])
def test_the_current_directory_is_never_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
  here = tmp_path / "around/here"
  here.mkdir(parents=True)
  monkeypatch.chdir(here)
  for overwrite in (False, True):
    message = _refusal(source=source, out=out, to="orbax", overwrite=overwrite)
    assert f"{out}: is the current directory or holds it" in message or "the input --source" in message
  for guard in (files.lock, files.write_atomically):
    with pytest.raises(UserError, match="is the current directory or holds it"), guard(Path(out)):
      pass
  assert here.is_dir()


def test_a_relative_name_with_dots_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  with files.lock(Path("../here/../made")), files.write_atomically(Path("../here/../made")) as temporary:
    temporary.mkdir()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "made"]


def test_an_out_that_cannot_be_a_folder_is_named(source: Path, tmp_path: Path) -> None:
  file = tmp_path / "file"
  file.write_text("mine")
  for overwrite in (False, True):
    assert f"--out={file}: is a link or a file; give a folder" in _refusal(
        source=source, out=file, to="orbax", overwrite=overwrite)
  message = _refusal(source=source, out=file / "out", to="orbax")
  assert message.startswith(f"{file / 'out'}: cannot be written (")
  assert "; give another name and start again" in message
  assert "lock" not in message
  assert file.read_text() == "mine"


def test_a_source_of_the_other_form_is_named(source: Path, orbax: Path, tmp_path: Path) -> None:
  out = tmp_path / "out"
  assert "is an orbax checkpoint; expected an HF folder, or --to=hf" in _refusal(source=orbax, out=out, to="orbax")
  assert "is an HF folder; expected one that --to=orbax wrote" in _refusal(source=source, out=out, to="hf")
  assert "no such folder; expected one that --to=orbax wrote" in _refusal(source=tmp_path / "no", out=out, to="hf")
  assert "name is empty" in _refusal(verify="")
  assert not out.exists()


def test_orbax_needs_its_tensor_list(orbax: Path, tmp_path: Path) -> None:
  """An Orbax checkpoint without its list of tensors is named."""
  damaged = shutil.copytree(orbax, tmp_path / "damaged")
  (damaged / "params/_METADATA").unlink()
  message = _refusal(source=damaged, out=tmp_path / "out", to="hf")
  assert "is no orbax checkpoint of what hf/config.json describes" in message
  assert "NoneType" not in message
