"""Which mesh is fastest, and with how many micro-batches: plans of several.

Plans are slow to make, so a search says how many it makes at most.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any

from dppo_jax import checks
from dppo_jax import plan_text
from dppo_jax import sharding
from dppo_jax.plan_types import Plan
from dppo_jax.plan_types import Topology


def meshes(config: Any, num_devices: int, sizes: Any) -> list[dict[str, int]]:
  """Meshes that divide what they split; those that split most first.

  Args:
    config: of the run; its own mesh and micro-batches do not count.
    num_devices: of the slice.
    sizes: of the model, a `layers.ModelConfig`.
  """
  found = []
  for data, fsdp, tensor in itertools.product(_divisors(num_devices), repeat=3):
    expert, rest = divmod(num_devices, data * fsdp * tensor)
    if rest or not expert or sizes.num_key_value_heads % tensor:
      continue
    if expert > 1 and (not sizes.num_experts or sizes.num_experts % expert):
      continue
    shards = data * fsdp
    if config.num_prompts % shards or not checks.microbatch_choices(
        config, num_batch_shards=shards
    ):
      continue
    found.append(
        dict.fromkeys(sharding.AXES, 1)
        | {'data': data, 'fsdp': fsdp, 'tensor': tensor, 'expert': expert}
    )
  return sorted(found, key=lambda x: (x['data'], x['expert'], x['tensor']))


def _divisors(number: int) -> list[int]:
  return [x for x in range(1, number + 1) if number % x == 0]


class _Enough(Exception):
  """As many compilations as were allowed."""


def search(
    config: Any,
    topology: Topology,
    model: Any,
    *,
    make_plan: Callable[..., Plan],
    max_compilations: int,
    mean_length: int = 0,
    say: Callable[[str], None] = print,
) -> list[Plan]:
  """Plans that fit, the fastest first.

  On each mesh the search begins with the config's number of micro-batches, or
  the smallest. Where that does not fit, more are tried; where it does, fewer,
  as each part of a mini-batch gathers all weights once. What lasts between
  steps is compared with the memory before anything compiles.

  Args:
    config: of the run; its own mesh is the first to be tried.
    topology: where it would run.
    model: from `program.architecture`.
    make_plan: `plan.make_plan`, which compiles a step.
    max_compilations: of steps, in all.
    mean_length: see `make_plan`.
    say: takes a line about the progress.

  Raises:
    ValueError: no mesh divides the config's sizes, or nothing fits.
  """
  candidates = meshes(config, len(topology.devices), model.config)
  if not candidates:
    raise ValueError(
        f'No mesh over {len(topology.devices)} devices divides '
        f'config.num_prompts={config.num_prompts}, its micro-batches and the '
        "model's heads; change num_prompts or group_size."
    )
  own = sharding.make_mesh(**config.mesh, devices=topology.devices).shape
  candidates.sort(key=lambda mesh: mesh != dict(own))
  count, plans, refused = itertools.count(1), [], []

  def try_one(mesh, number):
    """Whether it fits, and whether it was compiled."""
    compiled = []

    def compiling():
      compiled.append(next(count))
      if compiled[0] > max_compilations:
        raise _Enough
      say(f'compiling {compiled[0]} of at most {max_compilations}: {name}')

    name = f'{plan_text.axes(mesh)}, num_microbatches={number}'
    tried = checks.with_microbatches(config, number)
    tried.mesh.update(mesh)
    try:
      plans.append(make_plan(
          tried, topology, model, mean_length=mean_length, on_compile=compiling
      ))
      return True, True
    except ValueError as error:
      refused.append(f'{name}: {error}')
      say(refused[-1])
      return False, bool(compiled)

  for place, mesh in enumerate(candidates):
    try:
      _try_numbers(config, mesh, functools.partial(try_one, mesh))
    except _Enough:
      left = len(candidates) - place
      say(f'{left} of {len(candidates)} meshes are not done.')
      break
  if not plans:
    raise ValueError(f'Nothing fits {topology.name}. {refused[0]}')
  return sorted(plans, key=lambda plan: plan.seconds)


def _try_numbers(config, mesh, try_one):
  """Numbers of micro-batches on one mesh, twice or half of the one before."""
  choices = checks.microbatch_choices(
      config, num_batch_shards=mesh['data'] * mesh['fsdp']
  )
  start = config.learner.num_microbatches
  start = min(choices, key=lambda x: abs(x - start)) if start else choices[0]
  fits, compiled = try_one(start)
  number, sought = start, fits
  while compiled and fits == sought:
    if sought:
      following = [x for x in choices if 2 * x <= number][-1:]
    else:
      following = [x for x in choices if x >= 2 * number][:1]
    if not following:
      return
    [number] = following
    fits, compiled = try_one(number)
