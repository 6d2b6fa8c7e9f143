"""Floating-point operations of a traced program, loops as often as they run.

XLA's own count takes the body of a loop once, whatever its trip count, so it
says little of layers that are scanned and of tokens that are decoded. Here the
traced program is walked: a scan knows its length, and of other loops the caller
says how often they run. What is recomputed in a backward pass is in it.

Only products count, 2 * M * N * K for [M, K] times [K, N]: of all else a model
does little, and it is bound by memory.
"""

from collections.abc import Callable
import math
from typing import Any

import jax.extend.core as jex

# Name of a phase -> operations.
Count = dict[str, float]
# num_trips(phase, equation) -> (phase of the body, how often it runs).
TripsFn = Callable[[str, Any], tuple[str, float]]


def count(
    jaxpr: jex.ClosedJaxpr,
    *,
    phases: tuple[str, ...] = (),
    num_trips: TripsFn | None = None,
) -> Count:
  """Operations of a traced program, over all devices.

  Args:
    jaxpr: for example `jax.jit(f).trace(x).jaxpr`.
    phases: names of `jax.named_scope`s, of which the outermost counts; '' is
      what is in none of them.
    num_trips: of a `while_loop`, from the phase it is in and its equation.
      Refused if there is one and this is not given.

  Raises:
    ValueError: a loop of unknown length, or a product that is not counted.
  """
  total: Count = {}
  for phase, operations in _walk(jaxpr, '', phases, num_trips):
    total[phase] = total.get(phase, 0.0) + operations
  return total


def _walk(jaxpr, phase, phases, num_trips):
  """Yields (phase, operations) of each product."""
  if isinstance(jaxpr, jex.ClosedJaxpr):
    jaxpr = jaxpr.jaxpr
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    scopes = str(equation.source_info.name_stack).split('/')
    inside = phase or next((x for x in phases if x in scopes), '')
    of = lambda body, phase=inside: _walk(body, phase, phases, num_trips)
    if name in _PRODUCTS:
      yield inside, _PRODUCTS[name](equation)
    elif name in ('conv_general_dilated', 'custom_partitioning'):
      raise ValueError(f'{name} is not counted; add it to operations.py.')
    elif name == 'scan':
      yield from _times(params['length'], of(params['jaxpr']))
    elif name == 'while':
      if num_trips is None:
        raise ValueError('A while_loop needs num_trips: its length is unknown.')
      body_phase, trips = num_trips(inside, equation)
      yield from _times(trips, of(params['body_jaxpr'], body_phase))
    elif name == 'cond':  # The dearest branch runs.
      branches = [list(of(branch)) for branch in params['branches']]
      yield from max(branches, key=lambda x: sum(n for _, n in x))
    elif name == 'pallas_call':  # As if it left no block of its grid out.
      yield from _times(
          math.prod(params['grid_mapping'].grid), of(params['jaxpr'])
      )
    elif name == 'shard_map':  # Its program is that of a shard.
      sizes = params['mesh'].shape
      axes = params['newly_manual_axes']
      # A device has the rows of all experts, and multiplies those of its own.
      if _has_experts(params['jaxpr']):
        axes = [axis for axis in axes if axis != 'expert']
      shards = math.prod(sizes[axis] for axis in axes)
      yield from _times(shards, of(params['jaxpr']))
    else:
      for body in jex.jaxprs_in_params(params):
        yield from of(body)


def _has_experts(jaxpr):
  return any(
      equation.primitive.name == 'ragged_dot_general'
      or any(map(_has_experts, jex.jaxprs_in_params(equation.params)))
      for equation in jaxpr.eqns
  )


def _times(trips, counts):
  for phase, operations in counts:
    yield phase, trips * operations


def _dot(equation):
  (contracted, _), _ = equation.params['dimension_numbers']
  lhs = equation.invars[0].aval.shape
  depth = math.prod(lhs[axis] for axis in contracted)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _ragged_dot(equation):
  """Every row meets the matrix of its own group only: all of lhs, once.

  [M, K] x [G, K, N] -> [M, N]; or, in a gradient of the matrices, where the
  ragged axis is the one that is summed, [M, K] x [M, N] -> [G, K, N].
  """
  numbers = equation.params['ragged_dot_dimension_numbers']
  (_, contracted), (_, batch) = numbers.dot_dimension_numbers
  lhs, rhs = (x.aval.shape for x in equation.invars[:2])
  met = {*contracted, *batch, *numbers.rhs_group_dimensions}
  columns = math.prod(n for axis, n in enumerate(rhs) if axis not in met)
  return 2 * math.prod(lhs) * columns


_PRODUCTS = {
    'dot_general': _dot,
    'ragged_dot_general': _ragged_dot,
}
