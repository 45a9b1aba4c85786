"""Models by name, with a hub that answers as told."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from imm_jax.errors import UserError
from imm_jax.model import hub

ID = "someone/some-model-1.5b"


def _http(kind: type[Exception]) -> Exception:
  """Such an error without the response it was made from."""
  error = kind.__new__(kind)
  Exception.__init__(error, "refused\nmore")
  return error


def test_a_folder_and_the_embedded_model_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
  monkeypatch.chdir(tmp_path)
  (tmp_path / ID).mkdir(parents=True)
  assert hub.resolve(ID) == Path(ID)
  (tmp_path / f"{ID}.txt").touch()
  assert hub.resolve(f"{ID}.txt") == Path(f"{ID}.txt")
  assert (hub.resolve("tiny") / "model.safetensors").exists()
  assert hub.resolve("/no/such/folder") == Path("/no/such/folder")  # the error is left to whoever reads it


def test_a_hub_id_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  asked = {}
  monkeypatch.setattr(huggingface_hub, "snapshot_download",
                      lambda model, **options: asked.update(model=model, **options) or str(tmp_path))
  with pytest.raises(UserError, match=f"{ID}: has no safetensors on the hub"):
    hub.resolve(ID)
  (tmp_path / "model-00001-of-00002.safetensors").touch()
  assert hub.resolve(ID) == tmp_path
  assert asked["model"] == ID
  assert {"config.json", "tokenizer.json", "model.safetensors.index.json", "*.safetensors"} <= set(
      asked["allow_patterns"])
  assert not any(pattern.endswith(("bin", "pt", "py")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(("error", "expected"), [
    (_http(errors.GatedRepoError), f"is gated; accept its terms at https://huggingface.co/{ID}, run `hf auth login`"),
    (_http(errors.RepositoryNotFoundError), "no such folder, and no such model on the hub"),
    (_http(errors.HfHubHTTPError), f"`hf download {ID} --local-dir=DIR`"),
    (errors.LocalEntryNotFoundError("no network\nmore"), "the hub cannot be reached (no network); try again"),
    (ConnectionResetError("peer closed\nmore"), "the hub cannot be reached (peer closed)"),
    (type("RemoteProtocolError", (Exception,), {})("incomplete body"), "the hub cannot be reached (incomplete body)"),
    (OSError(28, "No space left on device"), "No space left on device")])
def test_what_the_hub_refuses_is_one_line(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
  def refuse(*_, **__):
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
  with pytest.raises(UserError) as raised:
    hub.resolve(ID)
  assert str(raised.value).startswith(f"{ID}: ")
  assert expected in str(raised.value)
  assert "\n" not in str(raised.value)
