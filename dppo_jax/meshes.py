"""Which devices of a run learn and which sample, each with a mesh of its own.

Unless the config says otherwise the two are the same devices.
"""

from typing import Any

import jax

from dppo_jax import sharding


def make_mesh(config: Any) -> Any:
  """The learner's: of all devices but those that only sample."""
  devices = jax.devices()
  learning = devices[:len(devices) - config.sampling.num_devices]
  return sharding.make_mesh(**config.mesh, devices=learning)


def sampling_mesh(config: Any, mesh: Any) -> Any:
  """The sampler's, beside the learner's `mesh`."""
  number = config.sampling.num_devices
  return sharding.sampling_mesh(
      mesh,
      **config.sampling.mesh,
      devices=jax.devices()[-number:] if number else None,
  )


def both(config: Any, mesh: Any) -> tuple[Any, Any]:
  """The learner's, which is `mesh`, and the sampler's."""
  return mesh, sampling_mesh(config, mesh)


def row_shards(config: Any, mesh: Any) -> dict[str, int]:
  """Over how many devices rows are split; arguments of `checks.check`."""
  learning, sampling = map(sharding.num_row_shards, both(config, mesh))
  return {'num_row_shards': learning, 'num_sampler_shards': sampling}
