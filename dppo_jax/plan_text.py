"""How a plan reads: its lines, what they assume, and a table of several."""

from collections.abc import Iterator

from dppo_jax import memory
from dppo_jax.plan_types import Plan


def describe(plan: Plan) -> Iterator[str]:
  """The plan, line by line."""
  chip, config = plan.chip, plan.config
  total = plan.sizes['total']
  other = plan.sizes['arguments'] - sum(plan.lasting.values())
  yield (
      f'{chip.name}, {axes(plan.mesh)}, '
      f'num_microbatches={config.learner.num_microbatches}: '
      f'{memory.readable(total)} of {memory.readable(chip.memory)} on each '
      'device: it fits.'
  )
  lasting = _shown(plan.lasting)
  yield f'  lasting      {lasting}; other arguments {_bytes(other)}'
  yield f'  temporary    {_shown(plan.temporary)}'
  yield f'  results      {_bytes(plan.sizes["results"])}'
  for phase in plan.phases:
    bound, seconds = phase.bound(chip)
    yield (
        f'  {phase.name:<12} {_operations(phase.flops)}, '
        f'{_bytes(phase.traffic, 0)} of memory, {_bytes(phase.sent, 1)} sent: '
        f'{_time(seconds)}, bound by {bound}'
    )
    if phase.collectives:
      yield '               ' + ', '.join(
          f'{number:,.0f} {kind}' for kind, number in phase.collectives.items()
      )
  yield f'  step         {_time(plan.seconds)} at least'
  if plan.unknown_loops:
    yield f'  {plan.unknown_loops} loops of unknown length count once.'


def evaluation(needed: int, held: int) -> str:
  """The line of held-out evaluation, of the bytes of `Plan.evaluate`."""
  return (
      f'  evaluation   {_bytes(needed)} beside the {_bytes(held)} of a run: '
      'it fits, too.'
  )


def assumptions(plan: Plan) -> str:
  """What the numbers rest on."""
  chip, expected = plan.chip, plan.expected
  return (
      f'Assumed: {chip.flops / 1e12:,.0f} TFLOP/s (bfloat16), '
      f'{chip.memory_bandwidth / 1e9:,.0f} GB/s of memory, '
      f'{chip.link_bandwidth / chip.torus_axes / 1e9:,.0f} GB/s out over one '
      f'torus axis ({chip.source}); a phase takes the longest of the three; '
      f'completions of {expected.mean_length:,.0f} tokens in the mean, '
      f'{expected.decode_steps:,.0f} steps of decoding; work spread evenly; no '
      'time for the verifier.'
  )


def table(plans: list[Plan]) -> Iterator[str]:
  """Plans in their order, a row each."""
  yield '| mesh | micro-batches | memory | learn | sample | decode | step |'
  yield '|---|---|---|---|---|---|---|'
  for plan in plans:
    times = [phase.bound(plan.chip)[1] for phase in plan.phases]
    yield (
        f'| {axes(plan.mesh)} | {plan.config.learner.num_microbatches} '
        f'| {memory.readable(plan.sizes["total"])} | '
        + ' | '.join(map(_time, (*times, plan.seconds))) + ' |'
    )


def axes(mesh: dict[str, int]) -> str:
  """'fsdp=16 tensor=4'."""
  split = [f'{axis}={size}' for axis, size in mesh.items() if size > 1]
  return ' '.join(split) or 'one device'


def _bytes(size: float, digits: int = 2) -> str:
  return _scaled(size, {'GB': 1e9, 'MB': 1e6, 'kB': 1e3}, digits)


def _operations(number: float) -> str:
  return _scaled(number, {'TFLOP': 1e12, 'GFLOP': 1e9, 'MFLOP': 1e6}, 1)


def _time(seconds: float) -> str:
  return _scaled(seconds, {'s': 1, 'ms': 1e-3, 'us': 1e-6}, 1)


def _scaled(value: float, units: dict[str, float], digits: int) -> str:
  """In the largest unit of which there is one, or in the last."""
  unit = next((x for x in units if value >= units[x]), list(units)[-1])
  return f'{value / units[unit]:,.{digits}f} {unit}'


def _shown(kinds: dict[str, int]) -> str:
  return ', '.join(
      f'{name} {_bytes(size)}' for name, size in kinds.items() if size
  )
