"""The mesh, and which axis of which array goes over it.

Mesh axes: `data` copies parameters, `fsdp` splits them and the batch, `tensor`
splits heads, widths and vocabulary, `expert` splits experts, `sequence` splits
the tokens of the rows that are being learned. Whole rows go over `data`, `fsdp`
and `sequence`. The sampler may use the same devices as another mesh.
"""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dppo_jax.types import PyTree

AXES = ('data', 'fsdp', 'tensor', 'expert', 'sequence')
BATCH_AXES = ('data', 'fsdp')
ROW_AXES = (*BATCH_AXES, 'sequence')
BATCH = P(ROW_AXES)
TOKENS = P(BATCH_AXES, 'sequence')

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
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
):
  """A mesh over all devices; one size may be -1 for "the rest".

  Args:
    data: copies of the parameters.
    fsdp: parts of parameters and of the batch.
    tensor: parts of heads, widths and vocabulary.
    expert: parts of the experts.
    sequence: parts of the rows that are being learned.
    devices: those of this run if not given.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  sizes = dict(
      zip(AXES, (data, fsdp, tensor, expert, sequence), strict=True)
  )
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


def sampling_mesh(mesh, *, tensor: int, expert: int):
  """The mesh of the sampler: the same devices in the same order.

  What `tensor` and `expert` leave goes to rows.

  Args:
    mesh: of the learner.
    tensor: over how many devices the sampler splits heads and widths; 0 for as
      many as the learner.
    expert: the same for experts.

  Raises:
    ValueError: if they do not divide the number of devices.
  """
  split = {
      'tensor': tensor or mesh.shape['tensor'],
      'expert': expert or mesh.shape['expert'],
  }
  if all(mesh.shape[axis] == size for axis, size in split.items()):
    return mesh
  rows, rest = divmod(mesh.size, math.prod(split.values()))
  if rest or min(split.values()) < 1:
    raise ValueError(
        f'config.sampling.mesh {split} does not divide the {mesh.size} devices '
        'of config.mesh; 0 takes what config.mesh has.'
    )
  sizes = dict.fromkeys(AXES, 1) | split | {'data': rows}
  types = (AxisType.Auto,) * len(AXES)
  if isinstance(mesh, AbstractMesh):
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=types)
  return Mesh(mesh.devices.reshape(*sizes.values()), AXES, axis_types=types)


def batch(mesh) -> NamedSharding:
  """Leading axis over `data`, `fsdp` and `sequence`: whole rows."""
  return NamedSharding(mesh, BATCH)


def tokens(mesh) -> NamedSharding:
  """Rows over `data` and `fsdp`, their tokens over `sequence`."""
  return NamedSharding(mesh, TOKENS)


def by_rows(sample: Callable[..., Any], mesh) -> Callable[..., Any]:
  """`sample(params, prompts, keys)`, on each shard of the rows by itself.

  Every device group decodes its own rows and leaves its loop when these have
  ended: no collective asks the others, and none moves weights within the loop,
  as they are gathered over `fsdp` before it. Over `tensor` and `expert` they
  stay split.

  Args:
    sample: from `sampling.make_sampler`; rows only know their own prompt.
    mesh: its axes of rows must divide the number of prompts.
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


def by_queries(mesh) -> Callable[..., Any] | None:
  """Attention of each part of a row to the whole of it.

  Every device has its own queries; the keys are gathered before, and their
  gradients summed and scattered after, once a layer and not once a block.

  Args:
    mesh: over whose axis `sequence` a row is split.

  Returns:
    `split(attend)`, for an `attend(queries, keys, rest)` of any queries of a
    row: trees of [B, T, ...], and a tree that all share. None if a device has
    whole rows.
  """
  parts = mesh.shape['sequence']
  if parts == 1:
    return None
  spec = P(None, 'sequence')

  def split(attend):
    def of_part(queries, keys, rest):
      gather = lambda x: jax.lax.all_gather(x, 'sequence', axis=1, tiled=True)
      return attend(queries, jax.tree.map(gather, keys), rest)

    def attend_all(queries, keys, rest):
      length = jax.tree.leaves(queries)[0].shape[1]
      # Zeros are padding: segment 0.
      pad = lambda x: jnp.pad(
          x, [(0, 0), (0, -length % parts)] + [(0, 0)] * (x.ndim - 2)
      )
      out = jax.shard_map(
          of_part,
          mesh=mesh,
          in_specs=(spec, spec, P()),
          out_specs=spec,
          axis_names={'sequence'},
          check_vma=False,
      )(*jax.tree.map(pad, (queries, keys)), rest)
      return out[:, :length]

    return attend_all

  return split


def on_its_own_mesh(
    sample: Callable[..., Any], *, mesh, learner_mesh
) -> Callable[..., Any]:
  """`by_rows` of what is brought from the learner's mesh to `mesh`.

  The parameters move once for a rollout, before its loop.
  """
  sample_rows = by_rows(sample, mesh)
  if mesh == learner_mesh:
    return sample_rows

  def sample_all(params, prompts, keys):
    move = jax.lax.with_sharding_constraint
    params = move(params, of_params(params, mesh))
    return sample_rows(params, *move((prompts, keys), batch(mesh)))

  return sample_all


def num_row_shards(mesh) -> int:
  """Over how many groups of devices whole rows are split."""
  return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def num_batch_shards(mesh) -> int:
  """Over how many of them the rows of a micro-batch are."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


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
    spec = _rule(_name(path), leaf.shape)
    return NamedSharding(mesh, _that_divides(spec, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(shard, tree)


def undivided(tree: PyTree, mesh) -> list[str]:
  """Axes of parameters that a rule would split, and that stay whole.

  Returns:
    'embed/embedding: 61 over tensor=8' for each that its mesh axis does not
    divide.
  """
  return [
      f'{_name(path)}: {size} over {axis}={mesh.shape[axis]}'
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      for axis, size in zip(_rule(_name(path), leaf.shape), leaf.shape)
      if axis is not None and size % mesh.shape[axis]
  ]


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _rule(name: str, shape: tuple[int, ...]) -> P:
  """The first that fits the path; P() if none does."""
  for pattern, spec in RULES:
    if re.search(pattern, name) and len(spec) <= len(shape):
      return spec
  return P()


def _that_divides(spec: P, shape: tuple[int, ...], mesh) -> P:
  return P(*(
      axis if axis is not None and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(spec, shape)
  ))
