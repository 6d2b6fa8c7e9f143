"""What the sampler's program does once, and what for every token.

Read from the program as it is traced and as XLA compiled it. N prompts, G
completions of each, B = N * G; P prompt and C completion tokens, L layers.
"""

import collections
import math

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest
import tiny_model
import whole_step

from dppo_jax import hlo
from dppo_jax import operations
from dppo_jax import program as program_lib
from dppo_jax import sampling
from dppo_jax.models import platforms

MODEL, CONFIG = tiny_model.MODEL, tiny_model.CONFIG
P, C = tiny_model.PROMPT_LENGTH, tiny_model.COMPLETION_LENGTH
N, G = 3, tiny_model.GROUP_SIZE  # No kernel has 12 rows.
LENGTH = 64  # Of completions whose cache is looked for.


def kernels_of(model=MODEL):
  """Shapes of the kernels of all layers, [L, in, out] each."""
  layers = jax.eval_shape(model.init, jax.random.key(0))['layers']
  return [x.shape for x in jax.tree.leaves(layers) if x.ndim == 3]


# --- prompts -----------------------------------------------------------------


def multiplied(num_steps, **options):
  """Operations of the sampler of a step that decodes so many tokens."""
  config, mesh, program = whole_step.make_small(
      MODEL, num_prompts=N, **options
  )
  traced = program.train_step.trace(
      *program_lib.abstract_arguments(config, mesh, program)
  )
  return operations.count(
      traced.jaxpr,
      phases=('learn', 'sample'),
      num_trips=lambda phase, _: (phase, num_steps * (phase == 'sample')),
  )['sample']


def products_of(num_rows, *, width, length):
  """Operations of a pass over rows of which each token sees `length`."""
  kernels = sum(map(math.prod, kernels_of())) * width
  heads = CONFIG.num_attention_heads * CONFIG.head_dim
  scores = 2 * CONFIG.num_hidden_layers * heads * width * length
  head = CONFIG.hidden_size * CONFIG.vocab_size  # Of the last token only.
  return 2 * num_rows * (kernels + scores + head)


@pytest.mark.parametrize('group_size, num_slots', [(4, 0), (2, 0), (4, 8)])
def test_each_unique_prompt_is_prefilled_once_and_never_while_decoding(
    group_size, num_slots
):
  options = {'group_size': group_size, 'sampling__num_slots': num_slots}
  once, with_a_step = (multiplied(x, **options) for x in (0, 1))
  # N rows, whatever the number of completions.
  assert once == products_of(N, width=P, length=P)
  # A token of each completion that is decoded.
  decoded = num_slots or N * group_size
  assert with_a_step - once == products_of(decoded, width=1, length=P + C)


# --- weights -----------------------------------------------------------------


def arguments_of(params_dtype):
  """Shapes of what a sampler takes."""
  return jax.eval_shape(lambda: (
      jax.tree.map(
          lambda x: x.astype(params_dtype), MODEL.init(jax.random.key(0))
      ),
      jax.tree.map(jnp.asarray, tiny_model.prompts(N)),
      sampling.row_keys(jax.random.key(0), N * G),
  ))


def within(jaxpr):
  """Yields the equations of a program and of all that it calls."""
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    yield equation
    for body in jex.jaxprs_in_params(equation.params):
      yield from within(body)


def named(name, jaxpr):
  return [x for x in within(jaxpr) if x.primitive.name == name]


def is_kernel(x):
  """Of a layer or of all of them; it may lie the other way round."""
  turned = lambda shape: tuple(sorted(shape[-2:]))
  return x.ndim in (2, 3) and turned(x.shape) in map(turned, kernels_of())


@pytest.mark.parametrize('num_slots', [0, 8])
@pytest.mark.parametrize('platform, given, dtype', [
    ('tpu', 'float32', 'bfloat16'),
    # There each product widens its factors.
    ('cpu', 'bfloat16', 'float32'),
])
def test_weights_are_cast_and_unstacked_before_the_loop_over_tokens(
    platform, given, dtype, num_slots
):
  sampler = tiny_model.make_sampler(dtype=dtype, num_slots=num_slots)
  with platforms.traced_for(platform):
    program = jax.jit(sampler).trace(*arguments_of(given)).jaxpr
  # The other loops copy prompts.
  [loop] = [
      x for x in named('while', program)
      if named('dot_general', x.params['body_jaxpr'])
  ]
  enter = [x.aval for x in loop.invars if is_kernel(x.aval)]
  assert len(enter) == CONFIG.num_hidden_layers * len(kernels_of())
  assert {(x.ndim, x.dtype.name) for x in enter} == {(2, dtype)}
  casts = lambda jaxpr: sum(
      is_kernel(x.invars[0].aval) for x in named('convert_element_type', jaxpr)
  )
  assert casts(loop.params['body_jaxpr']) == 0
  assert casts(program) == len(kernels_of())  # Of all layers at once.


@pytest.mark.parametrize('dtype', ['int8', 'float8_e4m3fn'])
def test_for_a_tpu_no_cache_is_multiplied_by_its_scales(dtype):
  def multiplied(platform):
    sampler = tiny_model.make_sampler(
        max_completion_length=LENGTH, cache_dtype=dtype
    )
    with platforms.traced_for(platform):
      program = jax.jit(sampler).trace(*arguments_of('float32')).jaxpr
    heads, size = CONFIG.num_key_value_heads, CONFIG.head_dim
    caches = {
        (rows, heads, *sizes)
        for rows, length in ((N * G, LENGTH), (N, P))
        for sizes in ((size, length), (length, size))
    }
    return sum(x.outvars[0].aval.shape in caches for x in named('mul', program))

  # Keys and values of prompts and of completions, in each layer.
  assert multiplied('cpu') == 4 * CONFIG.num_hidden_layers
  assert multiplied('tpu') == 0


# --- what XLA made of it -----------------------------------------------------

SLOTS = pytest.mark.parametrize(
    'num_slots', [0, pytest.param(8, marks=pytest.mark.slow)]
)


def compiled_loop(*, given='float32', **options):
  """Instructions of the loop over tokens and of all of the program."""
  sampler = tiny_model.make_sampler(max_completion_length=LENGTH, **options)
  text = jax.jit(sampler).lower(*arguments_of(given)).compile().as_text()
  program = hlo.parse(text)
  every = lambda names: [
      x for name in names for x in program.computations[name].values()
  ]
  outputs = f's32[{N * G},{LENGTH}]'
  [loop] = [
      x for x in every(program.computations)
      if x.opcode == 'while' and outputs in x.shape
  ]
  reached, names = set(), [loop.called[0]]
  while names:
    reached |= {(name := names.pop())}
    names += {y for x in every([name]) for y in x.called} - reached
  return program, every(sorted(reached)), every(program.computations)


@SLOTS
def test_no_weight_is_cast_or_taken_from_a_stack_in_the_compiled_loop(
    num_slots
):
  _, loop, program = compiled_loop(
      given='bfloat16', dtype='float32', num_slots=num_slots
  )
  stacked = {
      (CONFIG.num_hidden_layers, *order)
      for _, *sizes in kernels_of() for order in (sizes, sizes[::-1])
  }

  def of_weights(instructions):
    """Whether there are weights as they were given, and a stack of them."""
    shapes = ' '.join(x.shape for x in instructions)
    sizes = {sizes for sizes, _ in hlo.arrays(shapes)}
    return 'bf16[' in shapes, bool(stacked & sizes)

  assert of_weights(program) == (True, True)
  assert of_weights(loop) == (False, False)


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
@SLOTS
def test_the_compiled_loop_writes_the_cache_in_place(num_slots, dtype):
  program, loop, _ = compiled_loop(cache_dtype=dtype, num_slots=num_slots)
  rows = num_slots or N * G
  heads, size = CONFIG.num_key_value_heads, CONFIG.head_dim
  name = {'float32': 'f32', 'int8': 's8'}[dtype]
  caches = tuple(
      f'{name}[{rows},{heads},{sizes}]'
      for sizes in (f'{size},{LENGTH}', f'{LENGTH},{size}')
  )
  makers = [x for x in loop if x.shape.startswith(caches)]
  # Keys and values of each layer.
  count = collections.Counter(x.opcode for x in makers)
  assert count['dynamic-update-slice'] == 2 * CONFIG.num_hidden_layers
  passed_on = {'parameter', 'get-tuple-element', 'bitcast', 'fusion'}
  assert count.keys() <= passed_on | {'dynamic-update-slice'}
  for fusion in makers:
    if fusion.opcode == 'fusion':
      within = program.computations[fusion.called[0]].values()
      [root] = [x for x in within if x.is_root]
      assert root.opcode == 'dynamic-update-slice'
