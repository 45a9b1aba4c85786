"""The devices of a run."""

import functools

import ml_collections
from jax.sharding import Mesh

from imm_jax.model import hf, hub, published, sharding


def mesh_of(config: ml_collections.ConfigDict) -> Mesh:
  """The devices of a run."""
  return sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
                            hidden_size=_hidden_size(config.model))


@functools.cache
def _hidden_size(model: str) -> int:
  return (published.config_of(model) or hf.read_config(hub.resolve(model))).hidden_size
