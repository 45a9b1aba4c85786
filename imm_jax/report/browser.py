"""HTML of the page's answer browser, for the chunks that `samples` packs; its code is in `page.js`."""

import importlib.resources
from collections.abc import Sequence

from imm_jax.report.samples import Chunk


def render_section(chunks: Sequence[Chunk]) -> str:
  """Renders the section of the browser."""
  text = importlib.resources.files("imm_jax.report").joinpath("browser.html").read_text(encoding="utf-8")
  return text.replace("COUNT", f"{sum(chunk.rows for chunk in chunks):,}")


def render_data(chunks: Sequence[Chunk]) -> str:
  """Renders the packed answers, for the end of the page."""
  return "".join(f'<script type="application/gzip+base64" class="chunk">{chunk.packed}</script>' for chunk in chunks)
