"""The page's browser of answers, around the chunks that `samples` packs; `page.js` runs it."""

import importlib.resources
from collections.abc import Sequence

from imm_jax.report.samples import Chunk


def section(chunks: Sequence[Chunk]) -> str:
  """HTML of the section."""
  text = importlib.resources.files("imm_jax.report").joinpath("browser.html").read_text(encoding="utf-8")
  return text.replace("COUNT", f"{sum(chunk.rows for chunk in chunks):,}")


def data(chunks: Sequence[Chunk]) -> str:
  """HTML of the answers, for the page's end."""
  return "".join(f'<script type="application/gzip+base64" class="chunk">{chunk.packed}</script>' for chunk in chunks)
