"""What a run trains, and the policy that it makes.

The optimizer moves one tree, `params` of a `TrainState`; `frozen` beside it
stays as it was loaded. Everything else sees policies: whole parameter trees
that are joined of the two where they are used.

- Everything is trained: the policy is `params`.
- Path rules freeze some parameters or some of the stacked layers.
- LoRA: `params` are the adapters, and all that was loaded is frozen. The
  learner's policy is the unmerged sum, the sampler's is merged once a step.

Rules are pairs (regular expression, factor of the learning rate). A parameter
is named with the number of its layer, `layers/3/attention/q/kernel`, an adapter
`layers/3/attention/q/kernel/a`. Of the expressions found in a name the first
counts; without one the factor is 1; what has 0 is frozen.
"""

from collections.abc import Callable, Sequence
import functools
import re
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax import lora
from dppo_jax import sharding
from dppo_jax.models import weights
from dppo_jax.types import PyTree

Rules = Sequence[tuple[str, float]]

_LAYERS = 'layers/'


class Trainable(NamedTuple):
  """Functions from what was loaded to what is trained, and to policies.

  Attributes:
    split: (loaded, key) -> (params, frozen); the key is consumed.
    join: (params, frozen) -> the policy, to take gradients through.
    merge: (params, frozen) -> the policy as a plain tree, to sample from.
    start: (reference, frozen) -> the policy before the first update, where
      `reference` is a copy of the first `params`.
    adapters: (params, frozen) -> all adapters, for `lora.save_pretrained`; None
      without LoRA.
    factors: of the learning rate, a tree like `params`; None if all are 1.
  """

  split: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]]
  join: Callable[[PyTree, PyTree], PyTree]
  merge: Callable[[PyTree, PyTree], PyTree]
  start: Callable[[PyTree, PyTree], PyTree]
  adapters: Callable[[PyTree, PyTree], PyTree] | None = None
  factors: PyTree = None


def _first(params: PyTree, _: PyTree) -> PyTree:
  return params


EVERYTHING = Trainable(
    split=lambda loaded, _: (loaded, ()),
    join=_first,
    merge=_first,
    start=_first,
)


def placed_policy(
    trainable: Trainable, params: PyTree, frozen: PyTree, mesh: Any
) -> PyTree:
  """Shapes of the policy, with where it will be on the learner's mesh."""
  if trainable is EVERYTHING:
    return sharding.shapes(params)
  shapes = jax.eval_shape(trainable.merge, params, frozen)
  return jax.tree.map(
      sharding.placed, shapes, sharding.of_params(shapes, mesh)
  )


def make_trainable(
    shapes: PyTree,
    *,
    rules: Rules = (),
    rank: int = 0,
    alpha: float = 1.0,
    targets: Sequence[str] = lora.TARGETS,
) -> Trainable:
  """See the head of this file.

  Args:
    shapes: of the loaded parameters, stacked.
    rules: of the learning rate, on parameters or on adapters.
    rank: of adapters; 0 for none.
    alpha: see `lora.merge`.
    targets: see `lora.init`.

  Raises:
    ValueError: a rule that matches nothing, or nothing left to train.
  """
  if not rank:
    if not rules:
      return EVERYTHING
    parts = _Parts(shapes, rules)
    return Trainable(
        split=lambda loaded, _: parts.split(loaded),
        join=parts.join,
        merge=parts.join,
        start=lambda kept, frozen: parts.join(kept, frozen) if kept else kept,
        factors=parts.factors(),
    )
  init = functools.partial(lora.init, rank=rank, targets=targets)
  parts = _Parts(jax.eval_shape(init, shapes, jax.random.key(0)), rules)

  def split(loaded, key):
    params, still = parts.split(init(loaded, key))
    return params, {'base': loaded, 'adapters': still}

  def adapters(params, frozen):
    return parts.join(params, frozen['adapters'])

  def policy(put):
    return lambda params, frozen: put(
        frozen['base'], adapters(params, frozen), alpha=alpha
    )

  return Trainable(
      split=split,
      join=policy(lora.attach),
      merge=policy(lora.merge),
      # New adapters change nothing, so no copy of anything is needed.
      start=lambda _, frozen: frozen['base'],
      adapters=adapters,
      factors=parts.factors(),
  )


def fingerprint(tree: PyTree) -> int:
  """A number that other arrays do not have, however they are sharded.

  A checkpoint does not hold what is frozen; this tells whether what was loaded
  is still the same.
  """
  sums = jax.device_get(_sums_of_bits(jax.tree.leaves(tree)))
  return zlib.crc32(np.asarray(sums, np.uint32).tobytes())


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
  """Wraps around, so the order of the additions does not matter."""
  unsigned = {2: jnp.uint16, 4: jnp.uint32}
  return [
      jnp.sum(
          jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]),
          dtype=jnp.uint32,
      )
      for x in leaves
  ]


class _Parts:
  """The part of a tree that moves and the part that stands still.

  A stacked parameter of which only some layers move is in both parts, with the
  layers that belong there.
  """

  def __init__(self, shapes: PyTree, rules: Rules):
    flat = weights.flatten(shapes)
    self._factors = _factors(flat, rules)  # Path -> [L], or [1] without layers.
    self._ndim = {path: x.ndim for path, x in flat.items()}
    if not any(np.any(x) for x in self._factors.values()):
      raise ValueError(
          f'config.learning_rates={tuple(rules)} freezes every parameter; '
          'give some a factor above 0.'
      )

  def split(self, tree: PyTree) -> tuple[PyTree, PyTree]:
    """(what moves, what does not)."""
    moving, still = {}, {}
    for path, x in weights.flatten(tree).items():
      moves = self._factors[path] != 0
      if moves.all():
        moving[path] = x
      elif not moves.any():
        still[path] = x
      else:
        moving[path], still[path] = x[moves], x[~moves]
    return weights.unflatten(moving), weights.unflatten(still)

  def join(self, moving: PyTree, still: PyTree) -> PyTree:
    """What was split."""
    moving, still = weights.flatten(moving), weights.flatten(still)
    joined = {}
    for path, factors in self._factors.items():
      parts = [x[path] for x in (moving, still) if path in x]
      if len(parts) == 1:
        [joined[path]] = parts
      else:
        # Where each layer is: first those that move, then the others.
        order = np.argsort(np.argsort(factors == 0, kind='stable'))
        joined[path] = jnp.take(jnp.concatenate(parts), order, axis=0)
    return weights.unflatten(joined)

  def factors(self) -> PyTree:
    """Of what moves, as arrays that broadcast; None if all are 1."""
    moving = {
        path: factors[factors != 0].reshape(
            (-1,) + (1,) * (self._ndim[path] - 1)
        )
        for path, factors in self._factors.items()
        if np.any(factors)
    }
    if all(np.all(x == 1) for x in moving.values()):
      return None
    return weights.unflatten(moving)


def _factors(flat: dict[str, Any], rules: Rules) -> dict[str, np.ndarray]:
  """Path -> factor of each layer, float32; of one "layer" outside of them."""
  used, known = set(), []

  def factor(name):
    for pattern, value in rules:
      if re.search(pattern, name):
        used.add(pattern)
        return value
    return 1.0

  factors = {}
  for path, x in flat.items():
    names = [path]
    if path.startswith(_LAYERS):
      rest = path.removeprefix(_LAYERS)
      names = [f'{_LAYERS}{i}/{rest}' for i in range(x.shape[0])]
    known += names
    factors[path] = np.asarray([factor(name) for name in names], np.float32)
  for pattern, _ in rules:
    if pattern not in used:
      raise ValueError(
          f'config.learning_rates: {pattern!r} is found in no name that the '
          f'rules before it left over. Names are {known[0]!r} to '
          f'{known[-1]!r}, for example {known[len(known) // 2]!r}.'
      )
  return factors
