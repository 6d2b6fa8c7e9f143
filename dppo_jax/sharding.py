"""The mesh, and which axis of which array goes over it.

Mesh axes: `data` copies parameters, `fsdp` splits them and the batch, `tensor`
splits heads, widths and vocabulary, `expert` splits experts. Batches go over
`data` and `fsdp`.
"""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dppo_jax.types import PyTree

AXES = ('data', 'fsdp', 'tensor', 'expert')
ROW_AXES = ('data', 'fsdp')
BATCH = P(ROW_AXES)

# Path below the parameters -> axes; layers are stacked on a leading axis.
RULES = (
    (r'embed/embedding$', P('tensor', 'fsdp')),
    (r'head/kernel$', P('fsdp', 'tensor')),
    # Experts before the others, whose patterns fit them too.
    (r'layers/.*/experts/(gate|up)/kernel$',
     P(None, 'expert', 'fsdp', 'tensor')),
    (r'layers/.*/experts/down/kernel$', P(None, 'expert', 'tensor', 'fsdp')),
    (r'layers/.*/router/kernel$', P(None, 'fsdp', None)),
    (r'layers/.*/(q|k|v|gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
    (r'layers/.*/(o|down)/kernel$', P(None, 'tensor', 'fsdp')),
    (r'layers/.*/(q|k|v)/bias$', P(None, 'tensor')),
    # Adapters: a as the inputs of its kernel, b as the outputs.
    (r'layers/.*/experts/(gate|up)/kernel/a$',
     P(None, 'expert', 'fsdp', None)),
    (r'layers/.*/experts/(gate|up)/kernel/b$',
     P(None, 'expert', None, 'tensor')),
    (r'layers/.*/experts/down/kernel/a$', P(None, 'expert', 'tensor', None)),
    (r'layers/.*/experts/down/kernel/b$', P(None, 'expert', None, 'fsdp')),
    (r'layers/.*/(q|k|v|gate|up)/kernel/a$', P(None, 'fsdp', None)),
    (r'layers/.*/(q|k|v|gate|up)/kernel/b$', P(None, None, 'tensor')),
    (r'layers/.*/(o|down)/kernel/a$', P(None, 'tensor', None)),
    (r'layers/.*/(o|down)/kernel/b$', P(None, None, 'fsdp')),
    (r'/scale$', P()),
)


def make_mesh(
    *,
    data: int,
    fsdp: int,
    tensor: int,
    expert: int,
    devices: Sequence[jax.Device] | None = None,
):
  """A mesh over all devices; one size may be -1 for "the rest".

  Args:
    data: copies of the parameters.
    fsdp: parts of parameters and of the batch.
    tensor: parts of heads, widths and vocabulary.
    expert: parts of the experts.
    devices: those of this run if not given.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  sizes = dict(zip(AXES, (data, fsdp, tensor, expert), strict=True))
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) == 1 and fixed > 0 and count % fixed == 0:
    sizes[free[0]] = count // fixed
  if math.prod(sizes.values()) != count or min(sizes.values()) < 1:
    raise ValueError(
        f'mesh {sizes} does not fit {count} devices: the sizes must multiply '
        f'to {count}; one of them may be -1 for the rest.'
    )
  return jax.make_mesh(
      tuple(sizes.values()),
      AXES,
      axis_types=(AxisType.Auto,) * len(AXES),
      devices=devices,
  )


def batch(mesh) -> NamedSharding:
  """Leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, BATCH)


def by_rows(sample: Callable[..., Any], mesh) -> Callable[..., Any]:
  """`sample(params, prompts, keys)`, on each shard of the rows by itself.

  Every device group decodes its own rows and leaves its loop when these have
  ended: no collective asks the others, and none moves weights within the loop,
  as they are gathered over `fsdp` before it. Over `tensor` and `expert` they
  stay split.

  Args:
    sample: from `sampling.make_sampler`; rows only know their own prompt.
    mesh: its axes `data` and `fsdp` must divide the number of prompts.
  """
  if num_row_shards(mesh) == 1:
    return sample

  def sample_shard(*arguments):
    completions = sample(*arguments)
    num_steps = jax.lax.pmax(completions.num_steps, ROW_AXES)
    return completions._replace(num_steps=num_steps)

  def sample_all(params, prompts, keys):
    # Only a shape: rows go over the mesh, the number of steps does not.
    shapes = jax.eval_shape(sample, params, prompts, keys)
    return jax.shard_map(
        sample_shard,
        mesh=mesh,
        in_specs=(P(), BATCH, BATCH),
        out_specs=jax.tree.map(lambda x: BATCH if x.ndim else P(), shapes),
        axis_names=set(ROW_AXES),
        check_vma=False,
    )(params, prompts, keys)

  return sample_all


def num_row_shards(mesh) -> int:
  """Over how many groups of devices a batch is split."""
  return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def in_slots(mesh) -> NamedSharding:
  """As `batch`, behind a leading axis of slots."""
  return NamedSharding(mesh, P(None, *BATCH))


def replicated(mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, P())


def of_params(tree: PyTree, mesh) -> PyTree:
  """Shardings of a tree whose paths end like those of the parameters.

  Works for optimizer states too: their moments repeat the parameters' paths.
  Anything that no rule names is replicated, and so is an axis that its mesh
  axis does not divide.
  """

  def shard(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for pattern, spec in RULES:
      if re.search(pattern, name) and len(spec) <= len(leaf.shape):
        return NamedSharding(mesh, _that_divides(spec, leaf.shape, mesh))
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(shard, tree)


def _that_divides(spec: P, shape: tuple[int, ...], mesh) -> P:
  return P(*(
      axis if axis is not None and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(spec, shape)
  ))
