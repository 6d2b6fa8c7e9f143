"""What a config needs on a TPU slice that nobody has to rent first.

    python -m dppo_jax.plan \\
        --config=configs/qwen3_30b_a3b.py --topology=v5p:4x4x4

compiles the whole training step with the TPU's own compiler, on any machine and
without weights, and prints memory, operations, traffic and collectives of a
device, and a lower bound of the time. `--search` tries other meshes and numbers
of micro-batches. Needs the `libtpu` wheel: `pip install 'dppo_jax[tpu]'`.
"""

from collections.abc import Callable, Collection
import functools
from importlib import metadata
import importlib.util
import itertools
import math
import os
import re
import resource
import sys
import time
import types
from typing import Any

from absl import flags
import jax

from dppo_jax import checks
from dppo_jax import command_line
from dppo_jax import decoding
from dppo_jax import fitting
from dppo_jax import hlo
from dppo_jax import main
from dppo_jax import memory
from dppo_jax import meshes
from dppo_jax import operations
from dppo_jax import plan_search
from dppo_jax import plan_text
from dppo_jax import program as program_lib
from dppo_jax import registry
from dppo_jax import roofline
from dppo_jax import run_attention
from dppo_jax import sharding
from dppo_jax.chips import CHIPS
from dppo_jax.chunks import CHUNKS
from dppo_jax.models import load
from dppo_jax.models import platforms
from dppo_jax.models.packed_attention import WALK
from dppo_jax.objective import WHOLE
from dppo_jax.plan_types import Expected
from dppo_jax.plan_types import Plan
from dppo_jax.plan_types import Topology

_TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'Chip and shape of a slice, for example v5p:4x4x4.'
)
_SEARCH = flags.DEFINE_bool(
    'search', False, 'Try meshes and numbers of micro-batches, and rank them.'
)
_MAX_COMPILATIONS = flags.DEFINE_integer(
    'max_compilations', 12, 'Steps that a search compiles at most.'
)
_MEAN_LENGTH = flags.DEFINE_integer(
    'mean_length', 0,
    'Expected tokens of a completion, for estimates; 0: as long as allowed.'
)

# Scopes of the step; the last is the loop within the second.
PHASES = ('learn', 'sample', 'decode')

# Which token ends a completion changes nothing of what it costs.
_TOKENIZER = types.SimpleNamespace(eos_token_id=0, pad_token_id=0)

# With no TPU in sight libtpu would search for one, ask a metadata server, write
# logs and let only one process in; none of it matters to its compiler.
_COMPILER_ONLY = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_LOG_DIR': 'disabled',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
}


def make_topology(name: str) -> Topology:
  """The chips of a slice, from libtpu.

  Args:
    name: `CHIP:AxB` or `CHIP:AxBxC`, the chip one of `CHIPS`.

  Raises:
    ValueError: no such chip, or no slice of this shape.
    ImportError: libtpu is not installed.
  """
  kind, _, shape = name.partition(':')
  if kind not in CHIPS:
    raise ValueError(
        registry.unknown('chip of --topology', kind, CHIPS)
        + ' A topology is CHIP:SHAPE, for example v5p:4x4x4.'
    )
  chip = CHIPS[kind]
  sizes = shape.split('x')
  if len(sizes) != chip.torus_axes or not all(x.isdigit() for x in sizes):
    example = 'x'.join(['4'] * chip.torus_axes)
    raise ValueError(
        f'--topology={name}: the shape of a {kind} slice has {chip.torus_axes} '
        f'sizes, for example {kind}:{example}.'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
        'A plan needs the TPU compiler, which is not installed: '
        "pip install 'dppo_jax[tpu]', or in a checkout pip install -e '.[tpu]'."
    )
  from jax.experimental import topologies

  for variable, value in _COMPILER_ONLY.items():
    os.environ.setdefault(variable, value)
  options = dict(chip.options)
  if all(int(x) == 1 for x in sizes):  # Less than a host has.
    options['chips_per_host_bounds'] = [1, 1, 1]
  try:
    found = topologies.get_topology_desc(
        platform='tpu', topology_name=name, **options
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f'--topology={name}: {error}') from error
  return Topology(name, chip, list(found.devices))


def make_plan(
    config: Any,
    topology: Topology,
    model: Any,
    *,
    mean_length: int = 0,
    on_compile: Callable[[], None] = lambda: None,
) -> Plan:
  """Compiles the step of a config and counts what it does.

  Args:
    config: of a run; its mesh is over the chips of the topology.
    topology: where it would run.
    model: from `program.architecture`.
    mean_length: expected tokens of a completion; 0 for the most.
    on_compile: called before each compilation.

  Raises:
    ValueError: it cannot work, or does not fit.
  """
  checks.check_mode(
      config, num_devices=len(topology.devices), num_processes=1
  )
  if config.mode != 'fused':
    raise ValueError(
        f'config.mode={config.mode!r} has no plan, which is of one program; '
        "use config.mode='fused'."
    )
  mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
  shards = sharding.num_batch_shards(mesh)
  checks.check(
      config,
      num_batch_shards=shards,
      **meshes.row_shards(config, mesh),
  )
  method = main.make_method(config)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.stop = ()
  made = {}

  def make(config):
    made['config'] = config
    made['program'] = program_lib.make_program(
        config, mesh, method, model, _TOKENIZER
    )
    return made['program']

  def lower(program):
    made['arguments'] = program_lib.abstract_arguments(
        made['config'], mesh, program
    )
    traced = program.train_step.trace(*made['arguments'])
    made['jaxpr'] = traced.jaxpr
    on_compile()
    return _Kept(traced.lower(), made)

  with platforms.traced_for('tpu'):
    run_attention.warn_of_no_kernel(config, mesh, model)
    _, compile_s = fitting.make_program(
        config, make, lower, limit=topology.chip.memory, num_batch_shards=shards
    )
    return _count(topology, mesh, model, made, mean_length, compile_s)


def _evaluate(
    topology, mesh, model, config, arguments, trainable
) -> tuple[int, int]:
  """See `Plan.evaluate`."""
  state, scored, _ = arguments
  with platforms.traced_for('tpu'):
    return fitting.check_evaluation(
        program_lib.evaluation_program(config, mesh, model, _TOKENIZER),
        config,
        trainable=trainable,
        state=state,
        pending=[scored] * (1 + config.staleness),
        mesh=mesh,
        limit=topology.chip.memory,
    )


class _Kept:
  """A lowered step that remembers what it was compiled to."""

  def __init__(self, lowered: jax.stages.Lowered, where: dict[str, Any]):
    self.lowered, self.where = lowered, where

  def compile(self):
    self.where['compiled'] = self.lowered.compile()
    return self.where['compiled']


def _count(topology, mesh, model, made, mean_length, compile_s) -> Plan:
  config, compiled = made['config'], made['compiled']
  # Whole rows, as the sampler has them.
  sampling_mesh = sharding.sampling_mesh(mesh, **config.sampling.mesh)
  shards = sharding.num_row_shards(sampling_mesh)
  expected = expect(config, mean_length, sharding.num_row_shards(mesh))
  program = hlo.parse(compiled.as_text())
  unknown, loops = [], []
  slots = config.sampling.num_slots // shards
  filled = config.num_prompts * config.group_size // shards - slots
  in_slots = config.sampling.num_slots or config.sampling.num_halvings
  num_stages = run_attention.num_stages(config, mesh, model)

  def steps_of(name):
    """Of a loop over tokens; None if it is none."""
    stage = re.search(rf'\b{decoding.STAGE}(\d+)\b', name)
    if stage is None:
      return expected.decode_steps if in_slots else None
    ends = [1] + decoding.stage_ends(config.max_completion_length, num_stages)
    index = int(stage[1])
    return ends[index + 1] - ends[index]

  def parts_of(name):
    """Of packed rows, which a loop of the learner goes over."""
    whole = WHOLE in name.split('/')
    return expected.microbatches * (
        config.learner.num_minibatches if whole else 1
    )

  def trips(phase, loop):
    if decoding.FEWER in loop.op_name.split('/'):
      return 'decode', 0  # Slots are always full, see `expect`.
    if WALK in loop.op_name.split('/'):
      return phase, 0  # Most stretches see nothing in between.
    if decoding.FILL in loop.op_name.split('/'):
      of_phase = {'sample': slots, 'decode': filled / expected.decode_steps}
      return phase, of_phase[phase]
    if _in_chunks(loop.op_name):
      return phase, expected.chunks
    if phase == 'sample' and (count := steps_of(loop.op_name)) is not None:
      loops.append(loop)
      return 'decode', count
    if phase == 'learn' and config.learner.row_length:
      return phase, parts_of(loop.op_name)
    unknown.append(loop)
    return phase, 1

  def traced_trips(phase, equation):
    stack = str(equation.source_info.name_stack)
    if decoding.FEWER in stack.split('/'):
      return 'decode', 0
    if WALK in stack.split('/'):
      return phase, 0
    if _in_chunks(stack):
      return phase, expected.chunks
    if phase == 'sample' and (count := steps_of(stack)) is not None:
      return 'decode', count
    return phase, parts_of(stack) if phase == 'learn' else 1

  steps = list(hlo.executed(program, phases=PHASES[:2], num_trips=trips))
  flops = operations.count(
      made['jaxpr'], phases=PHASES[:2], num_trips=traced_trips
  )
  sizes = memory.of_step(compiled)
  state, scored, _ = made['arguments']
  carried = decode_carry(
      # The last stage has the largest cache.
      max((x.shape for x in loops), key=_num_bytes),
      head_dim=model.config.head_dim,
      lengths=(config.max_prompt_length, config.max_completion_length),
      rows=_rows(config, shards),
      lasting={x.shape for x in jax.tree.leaves(state.products)},
  ) if loops else {}
  return Plan(
      config=config,
      chip=topology.chip,
      mesh=dict(mesh.shape),
      expected=expected,
      lasting=memory.by_kind(state, scored),
      temporary=carried | {
          'activations and the rest': sizes['temporary']
          - sum(carried.values())
      },
      sizes=sizes,
      phases=roofline.phases(
          PHASES, flops, program, steps, num_devices=mesh.size
      ),
      unknown_loops=len(unknown),
      compile_s=compile_s,
      # Not `made`: a search would keep all that it compiled.
      evaluate=functools.partial(
          _evaluate, topology, mesh, model, config, made['arguments'],
          made['program'].trainable,
      ),
  )


def _num_bytes(shape: str) -> int:
  """Of all arrays of a shape as XLA writes it."""
  return sum(size for _, size in hlo.arrays(shape))


def _in_chunks(name: str) -> bool:
  """Whether a loop is over chunks of the head; in a gradient jvp(chunks)."""
  return re.search(rf'\b{CHUNKS}\b', name) is not None


def expect(config: Any, mean_length: int, num_row_shards: int = 1) -> Expected:
  """What lengths make of the loops whose ends the program does not know.

  All completions at once are decoded until the longest ends, which is taken to
  be as long as allowed. Slots are taken to be always full, until then.

  Args:
    config: of the run.
    mean_length: of completions; 0 for as long as allowed.
    num_row_shards: devices over which the learner's tokens are split.

  Raises:
    ValueError: no completion can be that long.
  """
  longest = config.max_completion_length
  if not 0 <= mean_length <= longest:
    raise ValueError(
        f'--mean_length={mean_length} must be between 0 (as long as allowed) '
        f'and config.max_completion_length={longest}.'
    )
  mean = mean_length or longest
  steps, slots = longest - 1, config.sampling.num_slots
  if slots:
    rows = config.num_prompts * config.group_size
    steps = max(steps, rows * (mean - 1) / slots)
  prompt = config.max_prompt_length
  filled = (prompt + mean) / (prompt + longest)
  learner = config.learner
  parts = learner.num_microbatches * (filled if learner.row_length else 1)
  tokens = checks.num_completions(config) * mean / learner.num_minibatches
  chunks = tokens / (parts * num_row_shards * (learner.chunk_size or tokens))
  return Expected(
      mean, steps, filled * learner.num_microbatches, math.ceil(chunks)
  )


def _rows(config, shards):
  """Leading sizes of arrays of completions and prompts on a device."""
  prompts, slots = config.num_prompts, config.sampling.num_slots
  sizes = prompts, prompts * config.group_size, slots
  return {size // shards for size in sizes if size}


def decode_carry(
    shape: str,
    *,
    head_dim: int,
    lengths: tuple[int, ...],
    rows: set[int],
    lasting: Collection[tuple[int, ...]] = (),
) -> dict[str, int]:
  """Bytes of keys and values, and of the sampler's weights, in its loop.

  Args:
    shape: of the loop, as XLA writes it.
    head_dim: of a key.
    lengths: of a prompt and of a completion.
    rows: numbers of prompts and completions on a device.
    lasting: shapes of what the loop writes in the state itself.
  """
  found = {'keys and values': 0, "sampler's weights": 0}
  for dims, size in hlo.arrays(shape):
    if len(dims) < 2 or tuple(dims) in lasting:
      continue
    if any(
        _holds(dims, (row, head_dim, length))
        for row, length in itertools.product(rows, lengths)
    ):
      found['keys and values'] += size
    elif not rows & set(dims):
      found["sampler's weights"] += size
  return found


def _holds(dims: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
  rest = list(dims)
  for size in wanted:
    if size not in rest:
      return False
    rest.remove(size)
  return True


def with_room_to_evaluate(
    plans: list[Plan], say: Callable[[str], None] = print
) -> tuple[Plan, str]:
  """The first plan beside whose run held-out evaluation fits, and a line of it.

  Args:
    plans: at least one, the best first.
    say: takes a line for each that is passed over.

  Raises:
    ValueError: there is none.
  """
  for place, plan in enumerate(plans, 1):
    try:
      needed, held = plan.evaluate()
    except ValueError as error:
      if place == len(plans):
        raise
      say(f'{plan_text.axes(plan.mesh)}: {error}')
      continue
    return plan, plan_text.evaluation(needed, held)


def host_peak() -> float:
  """Bytes that this process has had at most."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def run(config: Any, workdir: str | None) -> bool:
  """Body of the command line."""
  if workdir:
    raise ValueError('A plan writes nothing; leave out --workdir.')
  if not _TOPOLOGY.value:
    raise ValueError(
        'Which slice? For example --topology=v5p:4x4x4; chips: '
        f'{", ".join(CHIPS)}.'
    )
  jax.config.update('jax_platforms', 'cpu')  # It only compiles.
  # Without a device nothing can be read back.
  jax.config.update('jax_enable_compilation_cache', False)
  topology = make_topology(_TOPOLOGY.value)
  model = program_lib.architecture(config, *load.read_sizes(config.model.name))
  start = time.perf_counter()
  options = {'mean_length': _MEAN_LENGTH.value}
  if _SEARCH.value:
    plans = plan_search.search(
        config, topology, model, make_plan=make_plan,
        max_compilations=_MAX_COMPILATIONS.value, **options,
    )
    print('\n'.join(plan_text.table(plans)))
  else:
    plans = [make_plan(config, topology, model, **options)]
  plan, evaluation = with_room_to_evaluate(plans)
  print('\n'.join(plan_text.describe(plan)))
  print(evaluation)
  print(plan_text.assumptions(plan))
  print(
      f'jax {jax.__version__}, libtpu {metadata.version("libtpu")}; '
      f'{sum(plan.compile_s for plan in plans):,.0f} s of compiling steps in '
      f'{time.perf_counter() - start:,.0f} s ({time.process_time():,.0f} s of '
      f'CPU), {host_peak() / 1e9:.1f} GB of host memory.'
  )
  return True


if __name__ == '__main__':
  command_line.run(run)
