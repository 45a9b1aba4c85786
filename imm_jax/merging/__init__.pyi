"""Signatures of the registry's functions; `python -m imm_jax.merging.stubs` writes this file."""

from collections.abc import Sequence
from typing import Literal

import jax

from imm_jax.merging import registry
from imm_jax.merging.masks import quantize_drop_rate
from imm_jax.merging.options import PerModel, Vector
from imm_jax.merging.trees import PyTree, Setting, default_names

__all__ = [
  "arcee_fusion",
  "breadcrumbs",
  "breadcrumbs_ties",
  "dare",
  "dare_linear",
  "dare_ties",
  "default_names",
  "della",
  "della_linear",
  "fisher",
  "iimm",
  "imm",
  "karcher",
  "linear",
  "lines",
  "model_stock",
  "multislerp",
  "nearswap",
  "nuslerp",
  "passthrough",
  "quantize_drop_rate",
  "ram",
  "ramplus_tl",
  "registry",
  "sce",
  "slerp",
  "task_arithmetic",
  "ties",
  "wise_ft",
]

def arcee_fusion(base: PyTree, other: PyTree, *, names: PyTree | None = None, layer_axis: int = 0,
                 donate: bool = False) -> PyTree:
  """Takes only the most important changes of another model (Arcee Fusion)."""

def breadcrumbs(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel,
                gammas: PerModel = 0.01, scale: Setting = 1.0, normalize: bool = False,
                names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Applies task arithmetic without the largest and the smallest entries (Model Breadcrumbs)."""

def breadcrumbs_ties(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel,
                     gammas: PerModel = 0.01, scale: Setting = 1.0, normalize: bool = False,
                     names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Applies TIES with the trimming of Model Breadcrumbs: signs are elected among the remaining entries."""

def dare(delta: PyTree, *, drop_rate: Setting, key: jax.Array, names: PyTree | None = None,
         layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Drops entries of a delta at random and rescales the rest to preserve its mean (DARE, eq. 1-2)."""

def dare_linear(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel,
                scale: Setting = 1.0, normalize: bool = False, rescale: bool = True, key: jax.Array,
                names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Applies task arithmetic to task vectors after DARE: base + scale * sum_i w_i DARE(t_i - base)."""

def dare_ties(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel,
              scale: Setting = 1.0, normalize: bool = False, rescale: bool = True, key: jax.Array,
              names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Applies TIES with DARE in place of trimming: signs are elected among the remaining entries."""

def della(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel,
          epsilons: PerModel = 0.15, scale: Setting = 1.0, normalize: bool = True, rescale: bool = True,
          key: jax.Array, names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Drops small entries more often than large ones, then elects signs and averages (DELLA)."""

def della_linear(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, densities: PerModel,
                 epsilons: PerModel = 0.15, scale: Setting = 1.0, normalize: bool = False,
                 rescale: bool = True, key: jax.Array, names: PyTree | None = None, layer_axis: int = 0,
                 donate: bool = False) -> PyTree:
  """Applies task arithmetic to task vectors after DELLA's dropping; see `della`."""

def fisher(models: Sequence[PyTree], fishers: Sequence[PyTree], *, weights: PerModel = 1.0,
           floor: Setting = 1e-10, names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Averages models weighted entry by entry with the diagonal of each one's Fisher matrix (Fisher merging)."""

def iimm(base: PyTree, start: PyTree, tuned: PyTree, *, base_weight: Setting, drop_rate: Setting,
         importance: Vector, key: jax.Array, names: PyTree | None = None, layer_axis: int = 0,
         donate: bool = False) -> PyTree:
  """Merges as IMM does, with every layer's delta scaled by its importance (IIMM, eq. 7)."""

def imm(base: PyTree, start: PyTree, tuned: PyTree, *, base_weight: Setting, drop_rate: Setting,
        key: jax.Array, names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Merges a tuned model with the base, in one pass (IMM, eq. 5 and 6)."""

def karcher(models: Sequence[PyTree], *, max_iter: int = 10, tol: float = 1e-05,
            names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Averages models along arcs: the Karcher mean of their directions on the sphere, times their mean length."""

def linear(models: Sequence[PyTree], *, weights: PerModel, normalize: bool = True,
           names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Computes the weighted mean (model soups): sum_i w_i t_i / sum_i w_i."""

def lines(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, alpha: Setting = 0.5,
          beta: Setting = 0.5, names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Applies task arithmetic with a scale that grows linearly over the layers (LiNeS), as deeper ones are task-specific.
  """

def model_stock(base: PyTree, models: Sequence[PyTree], *, filter_wise: bool = False,
                names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Weighs the mean of the models against the base by the angle between their task vectors (Model Stock, eq. 2)."""

def multislerp(models: Sequence[PyTree], *, weights: PerModel, normalize_weights: bool = True,
               eps: float = 1e-08, base: PyTree | None = None, names: PyTree | None = None,
               layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Averages models, or with a base their task vectors, on a sphere (Multi-SLERP)."""

def nearswap(base: PyTree, other: PyTree, *, t: Setting, names: PyTree | None = None, layer_axis: int = 0,
             donate: bool = False) -> PyTree:
  """Takes entries of another model that are close to the base, and a smaller share of those far from it."""

def nuslerp(models: Sequence[PyTree], *, weights: PerModel, flatten: bool = True, row_wise: bool = False,
            base: PyTree | None = None, names: PyTree | None = None, layer_axis: int = 0,
            donate: bool = False) -> PyTree:
  """Interpolates along the arc between two models, or with a base between their task vectors (NuSLERP)."""

def passthrough(models: Sequence[PyTree], *, scales: PerModel = 1.0, names: PyTree | None = None,
                layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Copies one model times a factor: s t. With slices in a recipe it restacks layers of several models."""

def ram(base: PyTree, models: Sequence[PyTree], *, threshold: Setting = 1e-05, names: PyTree | None = None,
        layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Adds changes that only one model has made in full, and the mean of those that several have (RAM)."""

def ramplus_tl(base: PyTree, models: Sequence[PyTree], *, r: Setting = 0.1, alpha: Setting = 0.2,
               threshold: Setting = 1e-05, names: PyTree | None = None, layer_axis: int = 0,
               donate: bool = False) -> PyTree:
  """Merges as `ram` does, and amplifies changes that only one model has made by 1 + r min(shared / unique, alpha)."""

def sce(base: PyTree, models: Sequence[PyTree], *, select_topk: Setting = 1.0, names: PyTree | None = None,
        layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Adds the changes of largest variance between models, weighted by their squares, where signs agree (SCE)."""

def slerp(base: PyTree, other: PyTree, *, t: Setting, names: PyTree | None = None, layer_axis: int = 0,
          donate: bool = False) -> PyTree:
  """Interpolates between two models along an arc, tensor by tensor (Shoemake 1985)."""

def task_arithmetic(base: PyTree, models: Sequence[PyTree], *, weights: PerModel, scale: Setting = 1.0,
                    normalize: bool = False, names: PyTree | None = None, layer_axis: int = 0,
                    donate: bool = False) -> PyTree:
  """Adds weighted task vectors to a base: base + scale * sum_i w_i (t_i - base)."""

def ties(base: PyTree, models: Sequence[PyTree], *, weights: PerModel = 1.0, densities: PerModel,
         scale: Setting = 1.0, normalize: bool = True, scope: Literal['tensor', 'model'] = 'tensor',
         names: PyTree | None = None, layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Trims task vectors, elects signs, and averages the entries that agree (TIES)."""

def wise_ft(base: PyTree, other: PyTree, *, alpha: Setting, names: PyTree | None = None,
            layer_axis: int = 0, donate: bool = False) -> PyTree:
  """Interpolates linearly between a base and a model tuned from it (WiSE-FT): (1 - alpha) base + alpha other."""
