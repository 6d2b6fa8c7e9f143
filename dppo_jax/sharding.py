"""The mesh, and which axis of which array goes over it.

Mesh axes: `data` copies parameters, `fsdp` splits them and the batch, `tensor`
splits heads, widths and vocabulary, `expert` splits experts, `sequence` splits
the tokens of the rows that are being learned. Whole rows go over `data`, `fsdp`
and `sequence`. The sampler may use the same devices as another mesh.
"""

from collections.abc import Callable, Sequence
import functools
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dppo_jax.types import PyTree

AXES = ('data', 'fsdp', 'tensor', 'expert', 'sequence')
BATCH_AXES = ('data', 'fsdp')
ROW_AXES = (*BATCH_AXES, 'sequence')
BATCH = P(ROW_AXES)
TOKENS = P(BATCH_AXES, 'sequence')
# Kernels of experts, [E, D, F] and [E, F, D].
EXPERTS_IN = P('expert', 'fsdp', 'tensor')
EXPERTS_OUT = P('expert', 'tensor', 'fsdp')

# Path below the parameters -> axes; layers are stacked on a leading axis.
RULES = (
    (r'embed/embedding$', P('tensor', 'fsdp')),
    (r'head/kernel$', P('fsdp', 'tensor')),
    # Experts before the others, whose patterns fit them too.
    (r'layers/.*/experts/(gate|up)/kernel$', P(None, *EXPERTS_IN)),
    (r'layers/.*/experts/down/kernel$', P(None, *EXPERTS_OUT)),
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
    ValueError: if the sizes do not multiply to the number of devices, or these
      are several slices of TPUs.
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
  if devices[0].platform == 'tpu':
    slices = {getattr(device, 'slice_index', 0) for device in devices}
    if len(slices) > 1:
      raise ValueError(
          f'{count} TPU chips of {len(slices)} slices: a run takes one slice.'
      )
  # As jax.make_mesh, which refuses an axis of 8 on a torus of 4 x 4 x 4.
  grid = mesh_utils.create_device_mesh(
      tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sampling_mesh(
    mesh,
    *,
    tensor: int,
    expert: int,
    devices: Sequence[jax.Device] | None = None,
):
  """The mesh of the sampler. What `tensor` and `expert` leave goes to rows.

  Args:
    mesh: of the learner.
    tensor: over how many devices the sampler splits heads and widths; 0 for as
      many as the learner.
    expert: the same for experts.
    devices: others than the learner's; if not given its own, in their order.

  Raises:
    ValueError: if they do not divide the number of devices, the learner's too,
      see `bring`.
  """
  split = {
      'tensor': tensor or mesh.shape['tensor'],
      'expert': expert or mesh.shape['expert'],
  }
  if devices is None:
    same = all(mesh.shape[axis] == size for axis, size in split.items())
    return mesh if same else _mesh_of_rows(mesh, split)
  _mesh_of_rows(mesh, split)  # Or parameters have no way from one to the other.
  others = Mesh(np.asarray(devices), 'data', axis_types=(AxisType.Auto,))
  return _mesh_of_rows(others, split, 'sampling.num_devices')


def _mesh_of_rows(mesh, split: dict[str, int], whose: str = 'mesh'):
  """The devices of `mesh` in their order, rows over what `split` leaves."""
  rows, rest = divmod(mesh.size, math.prod(split.values()))
  if rest or min(split.values()) < 1:
    raise ValueError(
        f'config.sampling.mesh {split} does not divide the {mesh.size} devices '
        f'of config.{whose}; 0 takes what config.mesh has.'
    )
  sizes = dict.fromkeys(AXES, 1) | split | {'data': rows}
  types = (AxisType.Auto,) * len(AXES)
  if isinstance(mesh, AbstractMesh):
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=types)
  return Mesh(mesh.devices.reshape(*sizes.values()), AXES, axis_types=types)


def bring(params: PyTree, *, mesh, sampling_mesh) -> PyTree:
  """Parameters from the learner's mesh to the sampler's; waits for nothing.

  `jax.device_put` copies from device to device what is split the same way on
  both sides, and takes everything else through the host, for which it waits
  until there is something to take. So the learner's devices split it first.

  Args:
    params: on `mesh`; may still be computed.
    mesh: of the learner.
    sampling_mesh: from `sampling_mesh`, of the same or of other devices.
  """
  if mesh == sampling_mesh:
    return params
  split = {axis: sampling_mesh.shape[axis] for axis in ('tensor', 'expert')}
  as_there = of_params(params, _mesh_of_rows(mesh, split))
  params = jax.jit(_same, out_shardings=as_there)(params)
  if apart(mesh, sampling_mesh):
    params = jax.device_put(params, of_params(params, sampling_mesh))
  return params


def apart(mesh, other) -> bool:
  """Whether no device is in both meshes."""
  return set(mesh.devices.flat).isdisjoint(other.devices.flat)


def _same(tree: PyTree) -> PyTree:
  return tree


def batch(mesh) -> NamedSharding:
  """Leading axis over `data`, `fsdp` and `sequence`: whole rows."""
  return NamedSharding(mesh, BATCH)


def tokens(mesh) -> NamedSharding:
  """Rows over `data` and `fsdp`, their tokens over `sequence`."""
  return NamedSharding(mesh, TOKENS)


def by_rows(
    sample: Callable[..., Any], mesh, *, head_dim: int
) -> Callable[..., Any]:
  """`sample(params, prompts, keys)`, on each shard of the rows by itself.

  Every device group decodes its own rows and leaves its loop when these have
  ended: no collective asks the others, and none moves weights within the loop,
  as they are gathered over `fsdp` before it. Over `tensor` and `expert` they
  stay split, but between heads only: parts of one would be brought together for
  every token, on a CPU by all devices, which wait for those that have left.

  Args:
    sample: from `sampling.make_sampler`; rows only know their own prompt.
    mesh: its axes of rows must divide the number of prompts.
    head_dim: width of a head.
  """
  if mesh.size == 1:
    return sample

  def sample_shard(*arguments):
    completions = sample(*arguments)
    num_steps = jax.lax.pmax(completions.num_steps, ROW_AXES)
    return completions._replace(num_steps=()), num_steps

  def sample_all(params, prompts, keys):
    # Or they could come split as suits what made them.
    params = jax.lax.with_sharding_constraint(
        params, _between_heads(of_params(params, mesh), params, head_dim)
    )
    if num_row_shards(mesh) == 1:
      return sample(params, prompts, keys)
    completions, num_steps = jax.shard_map(
        sample_shard,
        mesh=mesh,
        in_specs=(P(), BATCH, BATCH),
        out_specs=(BATCH, P()),
        axis_names=set(ROW_AXES),
        check_vma=False,
    )(params, prompts, keys)
    return completions._replace(num_steps=num_steps)

  return sample_all


def _between_heads(shardings: PyTree, params: PyTree, head_dim: int) -> PyTree:
  """What makes or mixes heads, whole where a device would get parts of one."""

  def pin(path, sharding, x):
    if not re.search('/[qkvo]/', _name(path)) or 'tensor' not in sharding.spec:
      return sharding
    axis = list(sharding.spec).index('tensor')
    if not sharding.shard_shape(x.shape)[axis] % head_dim:
      return sharding
    spec = P(*(None if x == 'tensor' else x for x in sharding.spec))
    return NamedSharding(sharding.mesh, spec)

  return jax.tree_util.tree_map_with_path(pin, shardings, params)


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


def by_tokens(mesh) -> Callable[..., Any] | None:
  """Has each device map the tokens that it has.

  Parameters are gathered over `fsdp` before, once however often they are used,
  and their gradients summed and scattered after.

  Args:
    mesh: tokens [B, T] are as `tokens` says.

  Returns:
    `spread(fn)`, for a `fn(params, *trees)` of trees of [B, T, ...], whose
    result is one, with [1, 1] for what is of a device; padding is zeros. None
    where all have all tokens.
  """
  if num_row_shards(mesh) == 1:
    return None

  def spread(fn):
    def map_all(params, *trees):
      # XLA stumbles over axes of one device that are left to it.
      names = {*ROW_AXES, *(x for x in AXES if mesh.shape[x] == 1)}
      of_axes = lambda kept: jax.tree.map(
          lambda x: P(*(axis if axis in kept else None for axis in x.spec)),
          of_params(params, mesh),
      )
      specs, rest = of_axes({'fsdp'}), of_axes({*AXES} - names)
      return _over_tokens(
          lambda params, *trees: fn(_gather(params, specs, rest), *trees),
          mesh, params, specs, trees, axis_names=names, out_specs=TOKENS,
      )

    return map_all

  return spread


def by_experts(mesh) -> Callable[..., Any] | None:
  """Experts of the tokens that a device has, and no others.

  Tokens are sorted by expert where they are: a sort of all would bring them
  all together. Kernels are gathered over `fsdp` for it, a layer at a time, and
  their gradients summed and scattered; over `tensor` and `expert` they stay
  split, and the results of a token are summed.

  Args:
    mesh: tokens [B, T] are as `tokens` says.

  Returns:
    `spread`, see `models.experts.Experts`; None on a single device.
  """
  if mesh.size == 1:
    return None

  def spread(mix):
    def mix_all(kernels, *tokens):
      specs = type(kernels)(*(
          _that_divides(spec, kernel.shape, mesh)
          for spec, kernel in zip(
              (EXPERTS_IN, EXPERTS_IN, EXPERTS_OUT), kernels, strict=True
          )
      ))
      summed = tuple(x for x in ('tensor', 'expert') if x in specs.down)

      # Else the kernels of all layers would stay gathered for their gradients.
      @functools.partial(
          jax.checkpoint, prevent_cse=False, policy=_is_not_gathered
      )
      def of_device(kernels, *tokens):
        kernels, first = _gather(kernels, specs), None
        if 'expert' in specs.down and mesh.shape['expert'] > 1:
          first = jax.lax.axis_index('expert') * len(kernels.gate)
        return mix(kernels, *tokens, first)[None]

      # Summed out here, where its gradient costs nothing.
      return jnp.sum(
          _over_tokens(
              of_device, mesh, kernels, specs, tokens,
              axis_names=set(AXES),
              out_specs=P(summed or None, *TOKENS),
          ),
          axis=0,
      )

    return mix_all

  return spread


def _over_tokens(fn, mesh, params, specs, trees, *, axis_names, out_specs):
  """`shard_map` of trees of [B, T, ...], which it pads to parts alike."""
  length = jax.tree.leaves(trees)[0].shape[1]
  extra = -length % mesh.shape['sequence']
  pad = lambda x: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
  # With `check_vma`, JAX 0.10.2 takes the gradient of experts' tokens for 0.
  out = jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=(specs, *[TOKENS] * len(trees)),
      out_specs=out_specs,
      axis_names=axis_names,
      check_vma=False,
  )(params, *jax.tree.map(pad, tuple(trees)))
  axis = list(out_specs).index('sequence')
  cut = lambda x: jax.lax.slice_in_dim(
      x, 0, min(length, x.shape[axis]), axis=axis
  )
  return jax.tree.map(cut, out)


def _is_not_gathered(primitive, *_, **__):
  return primitive.name != 'all_gather'


def _gather(params, specs, rest=None):
  """All of what `specs` say is split over `fsdp`, within a `shard_map`.

  Args:
    params: as split.
    specs: of the axes that are the `shard_map`'s own.
    rest: of those that are left to the compiler; None for none.
  """

  def gather(x, spec, left):
    if 'fsdp' not in spec:
      return x
    axis = list(spec).index('fsdp')
    whole = lambda x: jax.lax.all_gather(x, 'fsdp', axis=axis, tiled=True)
    names = {x for x in left if x}
    if names:
      # Of an axis that is left to it, the compiler gathers all, too, and sums
      # gradients of all.
      whole = jax.shard_map(
          whole, in_specs=left, out_specs=left, axis_names=names,
          check_vma=False,
      )
    return whole(x)

  if rest is None:
    rest = jax.tree.map(lambda _: P(), specs)
  return jax.tree.map(gather, params, specs, rest)


def by_rows_and_heads(
    mesh, *, axis: int = 2, num_heads: int = 0
) -> Callable[..., Any]:
  """Attention of each device to its own rows and heads.

  For kernels, which XLA does not partition, and for attention in stretches, for
  which it would bring all rows to every device. Within `by_rows`, the rows are
  those of the device already.

  Args:
    mesh: whose axes `data` and `fsdp` divide the rows, and `tensor` the heads;
      a row is whole.
    axis: where heads are: 2 of [B, T, H, E], or 1.
    num_heads: of keys and values; where `tensor` does not divide them, all are
      on each of its devices. 0 if it does.

  Returns:
    `share(attend)`, for an `attend(q, k, v, rows, rest)` of trees with heads, a
    tree of [B, ...], and a tree that all share. What it makes has heads.
  """
  if mesh.size == 1:
    return lambda attend: attend

  def share(attend):
    def attend_all(*arguments):
      outer = jax.sharding.get_abstract_mesh()
      done = set(outer.manual_axes)
      rows = tuple(axis for axis in BATCH_AXES if axis not in done)
      heads = P(rows)
      if num_heads % mesh.shape['tensor'] == 0:
        heads = P(rows, *[None] * (axis - 1), 'tensor')
      return jax.shard_map(
          attend,
          mesh=outer if done else mesh,
          in_specs=(heads, heads, heads, P(rows), P()),
          out_specs=heads,
          axis_names=set(AXES) - done,
          check_vma=False,
      )(*arguments)

    return attend_all

  return share


def on_its_own_mesh(
    sample: Callable[..., Any], *, mesh, learner_mesh, head_dim: int
) -> Callable[..., Any]:
  """`by_rows` of what is brought from the learner's mesh to `mesh`.

  The parameters move once for a rollout, before its loop.
  """
  sample_rows = by_rows(sample, mesh, head_dim=head_dim)
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


def placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
  """The shape and dtype of an array that will be there; for `lower`."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def shapes(tree: PyTree) -> PyTree:
  """Of arrays, or of their shapes, with where they are."""
  return jax.tree.map(lambda x: placed(x, x.sharding), tree)


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
