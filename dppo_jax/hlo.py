"""What a compiled program does, read from its text: bytes, collectives, loops.

XLA's text is the only place that tells what partitioning and fusion made of a
program. It is that of one device. XLA's `cost_analysis` counts the body of a
loop once; here a body counts as often as it runs, which is known of a scan and
asked for of other loops.

Traffic is what instructions read from and write to the device's main memory:
operands and results, but of slices only what they touch, as a scanned layer is
a slice of all layers; nothing of what stays on the chip (memory spaces other
than 0). What fits a cache by luck counts, what is padded to tiles does not.
"""

from collections.abc import Callable, Iterator
import math
import re
from typing import NamedTuple

COLLECTIVES = (
    'all-gather',
    'all-reduce',
    'all-to-all',
    'collective-broadcast',
    'collective-permute',
    'ragged-all-to-all',
    'reduce-scatter',
)
# Neither move bytes themselves nor end an asynchronous move: what they call, or
# their start, is counted.
_MOVE_NOTHING = {
    'after-all', 'bitcast', 'call', 'conditional', 'constant', 'domain',
    'get-tuple-element', 'opt-barrier', 'parameter', 'partition-id',
    'replica-id', 'tuple', 'while',
}
_BITS = {'pred': 8, 'token': 0, 'c64': 64, 'c128': 128}

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_NAME = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_OPERAND = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
    r'(?:calls|body|to_apply|branch_computations|true_computation|'
    r'false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)
# The only lines that break within an instruction.
_KERNEL_METADATA = re.compile(r'kernel_metadata=\{\n.*?\n\}', re.DOTALL)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
  """One line of a program."""

  name: str
  shape: str  # As written, with layouts.
  opcode: str
  operands: tuple[str, ...]  # Names.
  arguments: str  # As written.
  rest: str  # Attributes, metadata, configuration.
  is_root: bool

  @property
  def op_name(self) -> str:
    """Where it comes from: scopes and functions, '/' between them."""
    found = _OP_NAME.search(self.rest)
    return found[1] if found else ''

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it calls, but for a loop's condition."""
    names = ' '.join(x.strip('{}') for x in _CALLED.findall(self.rest))
    return tuple(re.findall(r'[\w.\-]+', names))


class Program(NamedTuple):
  """Computations by name, each a dict of instructions by name, in order."""

  computations: dict[str, dict[str, Instruction]]
  entry: str


class Executed(NamedTuple):
  """An instruction of a running program."""

  instruction: Instruction
  computation: str
  times: float
  phase: str


# num_trips(phase, loop) -> (phase of the body, how often it runs).
TripsFn = Callable[[str, Instruction], tuple[str, float]]


def parse(text: str) -> Program:
  """Reads `compiled.as_text()`."""
  computations, entry, current = {}, '', None
  for line in _KERNEL_METADATA.sub('', text).splitlines():
    if header := _HEADER.match(line):
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and (found := _NAME.match(line)):
      instruction = _instruction(found[2], found[3], bool(found[1]))
      current[instruction.name] = instruction
  if not entry:
    raise ValueError('This is no text of a compiled program: it has no ENTRY.')
  return Program(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  shape, text = text[:end], text[end:].lstrip()
  start = text.index('(')
  end = _closing(text, start)
  arguments = text[start + 1:end - 1]
  return Instruction(
      name, shape, text[:start], tuple(_OPERAND.findall(arguments)), arguments,
      text[end:], is_root,
  )


def _closing(text: str, start: int) -> int:
  """Where what `text[start]` opens has ended."""
  depth = 0
  for match in re.finditer(r'[()]', text[start:]):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return start + match.end()
  raise ValueError(f'Unbalanced parentheses: {text[:80]!r}.')


def num_bytes(shape: str, *, on_chip: bool = True) -> int:
  """Bytes of an array or a tuple of them, as written; without their padding.

  Args:
    shape: for example `(f32[2,3]{1,0:T(8,128)}, s32[])`.
    on_chip: whether those outside of main memory count.
  """
  return sum(size for _, size in arrays(shape, on_chip=on_chip))


def arrays(
    shape: str, *, on_chip: bool = True
) -> Iterator[tuple[tuple[int, ...], int]]:
  """Yields (sizes, bytes) of each array in a shape, see `num_bytes`."""
  for dtype, dims, layout in _ARRAY.findall(shape):
    space = re.search(r'S\((\d+)\)', layout)
    if space and space[1] != '0' and not on_chip:
      continue
    sizes = tuple(int(size) for size in dims.split(',') if size)
    yield sizes, math.prod(sizes) * _bits(dtype) // 8


def _width(shape: str) -> int:
  """Bits of an element."""
  return _bits(_ARRAY.search(shape)[1])


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  found = re.search(r'\d+', dtype)  # bf16, s32, f8e4m3fn.
  return int(found[0]) if found else 0


def executed(
    program: Program,
    *,
    phases: tuple[str, ...] = (),
    num_trips: TripsFn = lambda phase, _: (phase, 1),
) -> Iterator[Executed]:
  """Instructions that run, with how often; of branches the one that moves most.

  Those within a fusion are not listed: it is one instruction.

  Args:
    program: from `parse`.
    phases: `jax.named_scope`s, of which the outermost counts; '' is what is
      in none of them.
    num_trips: of loops whose condition does not tell.
  """
  return _walk(program, program.entry, 1, '', phases, num_trips)


def _walk(program, computation, times, phase, phases, num_trips):
  for instruction in program.computations[computation].values():
    scopes = instruction.op_name.split('/')
    inside = phase or next((x for x in phases if x in scopes), '')
    yield Executed(instruction, computation, times, inside)
    of = lambda name, times=times, phase=inside: _walk(
        program, name, times, phase, phases, num_trips
    )
    if instruction.opcode == 'while':
      known, body_phase = trip_count(program, computation, instruction), inside
      if known is None:
        body_phase, known = num_trips(inside, instruction)
      yield from of(instruction.called[0], times * known, body_phase)
    elif instruction.opcode == 'conditional':
      branches = [list(of(name)) for name in instruction.called]
      moved = lambda branch: sum(x.times * traffic(program, x) for x in branch)
      yield from max(branches, key=moved)
    elif instruction.opcode in ('call', 'async-start', 'call-start'):
      for name in instruction.called:
        yield from of(name)


def trip_count(
    program: Program, computation: str, loop: Instruction
) -> int | None:
  """How often a loop runs; None if its text does not tell.

  XLA writes it down on some platforms; else the condition must compare a
  counter with a constant, as that of a scan does.
  """
  known = re.search(r'known_trip_count[^\d}]*(\d+)', loop.rest)
  if known:
    return int(known[1])
  name = re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]
  condition = program.computations[name]
  root = _root(condition)
  if root.opcode != 'compare' or 'direction=LT' not in root.rest:
    return None
  counter, bound = (condition.get(x) for x in root.operands)
  last = _constant(bound)
  if counter.opcode != 'get-tuple-element' or last is None:
    return None
  index = int(re.search(r'index=(\d+)', counter.rest)[1])
  around = program.computations[computation]
  start = around[around[loop.operands[0]].operands[index]]
  while start.opcode in ('copy', 'bitcast'):
    start = around[start.operands[0]]
  first = _constant(start)
  return last - (0 if first is None else first)


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != 'constant':
    return None
  found = re.fullmatch(r'-?\d+', instruction.arguments)
  return int(found[0]) if found else None


def traffic(program: Program, step: Executed) -> int:
  """Bytes of main memory that one execution of an instruction moves."""
  instruction = step.instruction
  if instruction.opcode in _MOVE_NOTHING | {'async-start', 'call-start'}:
    return 0
  if instruction.opcode.endswith(('-done', '-update')):
    return 0
  around = program.computations[step.computation]
  return _written(program, around, instruction) + sum(
      _read(program, around, instruction, place)
      for place in range(len(instruction.operands))
  )


_TAKES_A_PART = {'dynamic-slice', 'gather', 'slice'}
_WRITES_A_PART = {'dynamic-update-slice': 1, 'scatter': 2}  # Which operand.
_RENAMES = {'bitcast', 'reshape'}
# A part of what they make is made of the same part of what they are given.
_ELEMENT_BY_ELEMENT = _RENAMES | {
    'abs', 'add', 'and', 'clamp', 'compare', 'convert', 'divide', 'exponential',
    'exponential-minus-one', 'log', 'log-plus-one', 'logistic', 'maximum',
    'minimum', 'multiply', 'negate', 'not', 'or', 'power', 'rsqrt', 'select',
    'sqrt', 'subtract', 'tanh',
}


def _shape(around, name):
  return around[name].shape if name in around else ''


def _written(program, around, instruction):
  """Bytes that an instruction writes."""
  size = num_bytes(instruction.shape, on_chip=False)
  opcode = instruction.opcode
  if opcode.endswith('-start'):  # Operands, results and flags: results.
    shapes = [x[0] for x in re.finditer(_ARRAY, instruction.shape)]
    middle = len(instruction.operands)
    return num_bytes(' '.join(shapes[middle:2 * middle]), on_chip=False)
  if opcode in _WRITES_A_PART:
    part = instruction.operands[_WRITES_A_PART[opcode]]
    return min(size, num_bytes(_shape(around, part)))
  if opcode == 'fusion':
    return min(size, _written_within(program, instruction))
  return size


def _written_within(program, fusion):
  """What a fusion writes: updates of arrays in place are parts of them."""
  within = program.computations[fusion.called[0]]
  root = _root(within)
  names = root.operands if root.opcode == 'tuple' else (root.name,)
  total = 0
  for name in names:
    last, parts = _origin(program, within, name), []
    while last.opcode in _WRITES_A_PART:
      part = last.operands[_WRITES_A_PART[last.opcode]]
      parts.append(num_bytes(_shape(within, part)))
      last = _origin(program, within, last.operands[0])
    # What is made here and updated here is written as a whole.
    is_in_place = parts and last.opcode == 'parameter'
    total += sum(parts) if is_in_place else num_bytes(last.shape)
  return total


def _origin(program, within, name):
  """The instruction that made what others only rename."""
  last = within[name]
  if last.opcode in _RENAMES | {'copy'}:
    return _origin(program, within, last.operands[0])
  if last.opcode == 'fusion':
    inner = program.computations[last.called[0]]
    origin = _origin(program, inner, _root(inner).name)
    if origin.opcode == 'parameter':
      place = int(origin.arguments)
      return _origin(program, within, last.operands[place])
  return last


def _root(computation):
  return next(x for x in computation.values() if x.is_root)


def _read(program, around, instruction, place):
  """Bytes that an instruction reads of an operand."""
  size = num_bytes(_shape(around, instruction.operands[place]), on_chip=False)
  opcode = instruction.opcode
  if not size:
    return 0
  if opcode in _TAKES_A_PART and not place:
    return min(size, num_bytes(instruction.shape))
  if opcode in _WRITES_A_PART and not place:
    return 0
  if opcode == 'fusion':
    used = _used_within(program, instruction.called[0], place)
    return size if used is None else min(size, used)
  return size


def _used_within(program, computation, place):
  """Bytes that a fused computation takes of a parameter; None for all."""
  use = _use(program, computation, place)
  return None if use.is_result else use.taken


class _Use(NamedTuple):
  """What a computation makes of a parameter."""

  taken: int | None  # Bytes; None for all, and then the rest says nothing.
  is_result: bool = False  # The result is made of it, element by element.
  is_renamed: bool = False  # The result is the parameter by another name.


def _use(program, computation, place):
  within = program.computations[computation]
  start = next(
      x.name for x in within.values()
      if x.opcode == 'parameter' and x.arguments == str(place)
  )
  width = _width(within[start].shape)  # It may be converted before it is cut.
  taken, is_result = 0, False
  # What is made element by element -> whether it is the parameter renamed.
  renamed, left = {start: True}, [start]
  while left:
    name = left.pop()
    is_result |= within[name].is_root
    for user in within.values():
      if name not in user.operands:
        continue
      first = user.operands.index(name)
      passes, is_same = user.opcode in _ELEMENT_BY_ELEMENT, False
      if passes:
        is_same = user.opcode in _RENAMES
      elif user.opcode in _TAKES_A_PART and not first:
        taken += num_bytes(user.shape) * width // _width(within[name].shape)
      elif user.opcode in _WRITES_A_PART and not first and renamed[name]:
        continue
      elif user.opcode == 'fusion':
        use = _use(program, user.called[0], first)
        if use.taken is None:
          return use
        taken += use.taken * width // _width(within[name].shape)
        passes, is_same = use.is_result, use.is_renamed
      else:
        return _Use(None)
      if passes and user.name not in renamed:
        renamed[user.name] = is_same and renamed[name]
        left.append(user.name)
  return _Use(taken, is_result, renamed.get(_root(within).name, False))


class Collective(NamedTuple):
  """A collective of a running program.

  Attributes:
    kind: one of COLLECTIVES.
    phase: see `executed`.
    times: how often it runs.
    group: devices that take part together.
    payload: bytes of the larger of operand and result.
    sent: bytes that leave each device, if it goes around a ring.
    op_name: where it comes from.
  """

  kind: str
  phase: str
  times: float
  group: int
  payload: int
  sent: float
  op_name: str


def collectives(
    program: Program, steps: list[Executed], *, num_devices: int
) -> list[Collective]:
  """All collectives of a program, those within fusions too.

  Args:
    program: from `parse`.
    steps: from `executed`.
    num_devices: of the program, for collectives of all.
  """
  found = []
  for step in steps:
    for instruction in _with_fused(program, step.instruction):
      kind = instruction.opcode.removesuffix('-start')
      if kind in COLLECTIVES:
        found.append(_collective(step, instruction, num_devices))
  return found


def _with_fused(program, instruction):
  yield instruction
  if instruction.opcode == 'fusion':
    for name in instruction.called:
      within = program.computations[name]
      for inner in within.values():
        yield from _with_fused(program, _reduce_scatter(within, inner) or inner)


def _reduce_scatter(within, instruction):
  """What a TPU makes of it: a fused all-reduce of which a part is taken."""
  if instruction.opcode != 'all-reduce':
    return None
  users = [x for x in within.values() if instruction.name in x.operands]
  if len(users) != 1 or users[0].opcode != 'dynamic-slice':
    return None
  return instruction._replace(opcode='reduce-scatter', shape=users[0].shape)


def _collective(step, instruction, num_devices):
  kind = instruction.opcode.removesuffix('-start')
  # All shapes of a start are in its result, that of the operand too; a
  # reduce-scatter's operand is its group times its result.
  arrays = [num_bytes(x[0]) for x in re.finditer(_ARRAY, instruction.shape)]
  payload = max(arrays) if instruction.opcode != kind else sum(arrays)
  group = _group_size(instruction.rest, num_devices)
  if kind == 'reduce-scatter':
    payload *= group
  passes = {'all-reduce': 2 * (group - 1) / group, 'collective-permute': 1}
  return Collective(
      kind, step.phase, step.times, group, payload,
      payload * passes.get(kind, (group - 1) / group),
      instruction.op_name or step.instruction.op_name,
  )


def _group_size(rest: str, num_devices: int) -> int:
  """Devices of a replica group, in any of the forms XLA writes."""
  if 'source_target_pairs' in rest:
    return 2
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
    return len(found[1].split(','))
  if found := re.search(r'replica_groups=\[([\d,]+)\]<=', rest):
    return int(found[1].split(',')[-1])
  if found := re.search(
      r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', rest
  ):
    sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", found[1]))
    parts = re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  return num_devices
