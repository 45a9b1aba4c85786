"""The methods of a run: for each a record of what a round samples, trains on, starts from, merges and hands on.

A new method is a record in `METHODS` and a test of it; `loop.plan` and the stages read everything from the record.
"""

from typing import NamedTuple

import ml_collections


class Anchor(NamedTuple):
  """Describes a term of the loss that keeps SFT near the base.

  Attributes:
    summary: what its weight multiplies.
    predicts: whether it compares predictions, for which the base computes, too, rather than weights as stored.
  """

  summary: str
  predicts: bool


# By the name of its metric and of its weight in `training.additions`; its setting is `sft.NAME_weight`.
ANCHORS = {"l2_sp": Anchor("L2 to the base", predicts=False), "kl": Anchor("KL to the base", predicts=True)}
# The folder of a round in which a model is that the round may hand on, by `Method.next_model`.
_FOLDERS = {"merged": "merged", "tuned": "sft", "ema": "sft/ema"}


class Method(NamedTuple):
  """Describes how the rounds of a method work.

  Attributes:
    summary: a short description.
    source: the publication; "ours" for what is not published.
    data: the data that a round trains on: `right` (its right samples), `mixture` (those and a share of each earlier
      round's), `accumulation` (those and all of the earlier rounds'), or `worked` (real worked answers; nothing is
      sampled).
    start: the model that SFT starts from: `last`, handed on by the previous round, or `base`.
    merge: name of the merging method after SFT; empty for none.
    next_model: the model that the next round starts from and samples with: `merged`, `tuned`, or `ema`, the average of
      the tuned model's weights over SFT.
    anchor: the term that keeps SFT near the base, a key of ANCHORS; empty for none.
    lora: whether SFT trains LoRA adapters rather than all weights.
  """

  summary: str
  source: str
  data: str = "right"
  start: str = "last"
  merge: str = ""
  next_model: str = "tuned"
  anchor: str = ""
  lora: bool = False

  @property
  def next_folder(self) -> str:
    """Returns the folder, in that of a round, of the model that the next round starts from and samples with."""
    return _FOLDERS[self.next_model]


METHODS = {
    "imm": Method("SFT on right samples, DARE on the change, mean with the base", "the paper, eq. 5 and 6",
                  merge="imm", next_model="merged"),
    "iimm": Method("imm with each layer's change scaled by its importance", "the paper, eq. 7", merge="iimm",
                   next_model="merged"),
    "star": Method("SFT on right samples", "Zelikman et al. 2022, arXiv 2203.14465; from the last model: the paper"),
    "data_mixture": Method("star on a share of earlier rounds' samples too", "the paper's baseline; the share is ours",
                           data="mixture"),
    "data_accumulation": Method("star on all samples so far", "Gerstgrasser et al. 2024, arXiv 2404.01413",
                                data="accumulation"),
    "rest_em": Method("SFT of the base, in every round, on the last model's right samples",
                      "ReST-EM: Singh et al. 2023, arXiv 2312.06585", start="base"),
    "wise_ft": Method("star; each round's model is also merged with the base by a mean; the merged model is evaluated "
                      "and not handed on", "Wortsman et al. 2021, arXiv 2109.01903", merge="wise_ft"),
    "lines": Method("SFT on right samples, the change scaled by a factor that is linear in depth",
                    "LiNeS: Wang et al. 2024, arXiv 2410.17146; round after round is ours", merge="lines",
                    next_model="merged"),
    "real": Method("SFT on real worked answers", "the paper, figure 9", data="worked"),
    "l2_sp": Method("star with w/2 ||theta - base||^2 in the loss", "Li et al. 2018, arXiv 1802.01483; to the base in "
                    "every round: ours", anchor="l2_sp"),
    "kl": Method("star with the KL to the base on the answers' tokens in the loss", "Li & Hoiem 2016, arXiv "
                 "1606.09282, at temperature 1; on the learned tokens: ours", anchor="kl"),
    "ema": Method("star that hands on the average of the weights over SFT", "Tarvainen & Valpola 2017, arXiv "
                  "1703.01780; in each round anew: ours", next_model="ema"),
    "lora": Method("star with a low-rank change of each projection", "Hu et al. 2021, arXiv 2106.09685; merged after "
                   "each round: ours", lora=True),
}


def get_method(config: ml_collections.ConfigDict) -> Method:
  """Returns the record of a config's method."""
  return METHODS[config.method]


def get_merge_method(method: str, configured: str) -> str:
  """Returns the name of each round's merging method: `merge.method` or the method's own; empty if nothing is merged.

  >>> get_merge_method("imm", ""), get_merge_method("imm", "ties"), get_merge_method("star", "ties")
  ('imm', 'ties', '')
  """
  return METHODS[method].merge and (configured or METHODS[method].merge)


def list_merging_methods() -> list[str]:
  """Lists the names of the methods that merge."""
  return [name for name, method in METHODS.items() if method.merge]


def keeps_average(config: ml_collections.ConfigDict) -> bool:
  """Returns whether SFT keeps a moving average of the weights."""
  return config.sft.ema or get_method(config).next_model == "ema"


def get_anchor_weights(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Returns the weight of each anchor by its name, 0 if the method has another or none.

  >>> from configs import tiny
  >>> get_anchor_weights(tiny.get_config())
  {'l2_sp': 0.0, 'kl': 0.0}
  """
  own = get_method(config).anchor
  return {name: config.sft[f"{name}_weight"] if name == own else 0.0 for name in ANCHORS}


def is_sampling(config: ml_collections.ConfigDict) -> bool:
  """Returns whether a run samples answers to train on."""
  return get_method(config).data != "worked" and config.data.real_fraction < 1
