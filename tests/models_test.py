"""The model is the Qwen3 of transformers, however its rows are laid out."""

import functools
import pathlib
import re

from flax import nnx
from golden import make_embedded_logits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from dppo_jax.models import alignment
from dppo_jax.models import causal_lm
from dppo_jax.models import experts
from dppo_jax.models import layers
from dppo_jax.models import load
from dppo_jax.models import platforms
from dppo_jax.models import rope

MODEL = tiny_model.MODEL
GOLDEN = pathlib.Path(make_embedded_logits.PATH)


def apply(model, params, tokens, **options):
  """`model.apply`, compiled once per model and shape."""
  return _compiled(model.replace(params=None))(
      params, jnp.asarray(tokens), **options
  )


@functools.cache
def _compiled(model):
  return tiny_model.jit(model.apply)


def positions_and_segments(mask):
  mask = jnp.asarray(mask)
  return causal_lm.positions_of(mask), mask.astype(jnp.int32)


def logits_of(params, tokens, mask, model=MODEL):
  """[B, T, V], with what `prefill` and the learner say of padding."""
  positions, segment_ids = positions_and_segments(mask)
  return apply(
      model, params, tokens, positions=positions, segment_ids=segment_ids
  )


def random_tokens(*shape, seed=0):
  rng = np.random.RandomState(seed)
  return rng.randint(1, tiny_model.CONFIG.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize('name', ['embedded', 'tied', 'untied'])
def test_logits_are_those_of_transformers(tmp_path, name):
  folder = 'embedded'
  if name != 'embedded':
    folder = tmp_path
    make_embedded_logits.write_tiny(folder, tied=name == 'tied')
  model = load.from_pretrained(folder)
  with np.load(GOLDEN) as golden:
    tokens, mask, expected = (
        golden[f'{name}/{part}'] for part in ('tokens', 'mask', 'logits')
    )
  actual = np.asarray(logits_of(model.params, tokens, mask, model))[mask]
  # Logits that hardly differ would prove little.
  assert np.std(expected) > 0.5
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize('left, right', [(3, 0), (0, 3), (2, 1)])
def test_padding_on_either_side_does_not_change_logits(left, right):
  params, tokens = tiny_model.params(), random_tokens(2, 6)
  plain = logits_of(params, tokens, np.ones((2, 6), bool))
  pad = [(0, 0), (left, right)]
  padded = logits_of(
      params, np.pad(tokens, pad), np.pad(np.ones((2, 6), bool), pad)
  )
  np.testing.assert_allclose(
      padded[:, left : left + 6], plain, rtol=0, atol=1e-5
  )


def test_what_stands_in_the_padding_does_not_matter():
  params, tokens = tiny_model.params(), random_tokens(2, 7)
  mask = np.broadcast_to(np.arange(7) >= 3, (2, 7))
  others = np.where(mask, tokens, random_tokens(2, 7, seed=1))
  assert (others != tokens).any()
  np.testing.assert_array_equal(
      np.asarray(logits_of(params, tokens, mask))[mask],
      np.asarray(logits_of(params, others, mask))[mask],
  )


def test_batch_order_does_not_change_logits():
  params, tokens = tiny_model.params(), random_tokens(4, 6)
  mask = np.arange(6) >= np.array([[0], [3], [1], [5]])
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(
      logits_of(params, tokens[order], mask[order]),
      np.asarray(logits_of(params, tokens, mask))[order],
      rtol=0, atol=1e-5,
  )


def test_segments_isolate_two_sequences_packed_in_one_row():
  params = tiny_model.params()
  first, second = random_tokens(1, 4), random_tokens(1, 5, seed=1)
  alone = [
      logits_of(params, tokens, np.ones(tokens.shape, bool))
      for tokens in (first, second)
  ]
  packed = apply(
      MODEL,
      params,
      jnp.concatenate([first, second], axis=1),
      positions=jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
      segment_ids=jnp.array([[1] * 4 + [2] * 5]),
  )
  np.testing.assert_allclose(
      packed, jnp.concatenate(alone, axis=1), rtol=0, atol=1e-5
  )


def test_a_token_sees_the_past_only():
  params, tokens = tiny_model.params(), random_tokens(1, 6)
  changed = tokens.copy()
  changed[0, 4] = 1 + tokens[0, 4] % 60
  before, after = (
      np.asarray(apply(MODEL, params, x)) for x in (tokens, changed)
  )
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert np.abs(before[:, 4:] - after[:, 4:]).max() > 0.1


def test_cached_decoding_equals_the_full_forward():
  # Two prompts of 2 and 4 tokens, two completions of 5 tokens of each.
  params, prompts = tiny_model.params(), random_tokens(2, 4)
  mask = np.arange(4) >= np.array([[2], [0]])
  completions = random_tokens(4, 5, seed=1)
  rows = np.repeat(prompts, 2, axis=0)
  full = logits_of(
      params,
      np.concatenate([rows, completions], axis=1),
      np.concatenate([np.repeat(mask, 2, 0), np.ones((4, 5), bool)], axis=1),
  )
  logits, kept = tiny_model.jit(MODEL.prefill)(
      params, jnp.asarray(prompts), mask=jnp.asarray(mask)
  )
  np.testing.assert_allclose(
      jnp.repeat(logits, 2, axis=0), full[:, 3], rtol=0, atol=1e-5
  )
  decode, unstacked = tiny_model.jit(MODEL.decode), MODEL.unstacked(params)
  cache = MODEL.empty_cache(4, 5, jnp.float32)
  for i in range(5):
    logits, new = decode(
        unstacked,
        jnp.asarray(completions[:, i]),
        positions=jnp.repeat(jnp.array([2, 4]), 2) + i,
        rotations=MODEL.rotations(9),
        prompt_cache=kept.cache,
        prompt_mask=jnp.asarray(mask),
        cache=cache,
        place=jnp.int32(i),
        count=jnp.int32(i + 1),
    )
    cache = new.cache
    np.testing.assert_allclose(logits, full[:, 4 + i], rtol=0, atol=1e-5)


@pytest.mark.parametrize('remat', causal_lm.REMAT[1:])
def test_recomputing_activations_gives_the_same_gradient(remat):
  params, tokens = tiny_model.params(), jnp.asarray(random_tokens(2, 6))

  def gradient(model):
    loss = lambda p: jnp.sum(jax.nn.log_softmax(model.apply(p, tokens)) ** 2)
    return tiny_model.jit(jax.grad(loss))(params)

  tiny_model.assert_trees_close(
      gradient(MODEL.replace(remat=remat)),
      gradient(MODEL),
      rtol=1e-4,
      atol=1e-3,
  )


def gradient_of_layers(**options):
  """A gradient, the operations of its program, and its arrays of all layers."""
  params, tokens = tiny_model.params(), jnp.asarray(random_tokens(3, 7))
  model = MODEL.replace(**options)
  loss = lambda p: jnp.sum(jax.nn.log_softmax(model.apply(p, tokens)) ** 2)
  compiled = jax.jit(jax.grad(loss)).lower(params).compile()
  # Of all layers, some numbers for each of 3 x 7 tokens.
  of_all = rf'f32\[{tiny_model.CONFIG.num_hidden_layers},3,7,\d+'
  return (
      compiled(params),
      compiled.cost_analysis()['flops'],
      len(re.findall(of_all, compiled.as_text())),
  )


@pytest.mark.parametrize('remat', ['none', 'products'])
def test_layers_one_by_one_have_the_same_gradient_and_no_arrays_of_all(remat):
  expected, _, in_loop = gradient_of_layers(remat=remat)
  found, _, one_by_one = gradient_of_layers(remat=remat, unrolls_layers=True)
  tiny_model.assert_trees_close(found, expected, rtol=1e-4, atol=1e-3)
  assert in_loop and not one_by_one


def test_layers_one_by_one_are_computed_again_if_that_is_asked_for():
  # In one program without a loop a compiler could find what was there.
  _, kept, _ = gradient_of_layers(remat='none', unrolls_layers=True)
  _, again, _ = gradient_of_layers(remat='full', unrolls_layers=True)
  assert again > 1.2 * kept


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize(
    'dtype, tolerance', [('float32', 1e-6), ('bfloat16', 0.02)]
)
def test_a_rotation_is_a_product_of_complex_numbers(platform, dtype, tolerance):
  rng = np.random.RandomState(0)
  x, upstream = rng.standard_normal((2, 2, 5, 3, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]], np.int32)
  turns = positions[..., None, None] * 100.0 ** (-np.arange(4) / 4)
  phase = np.exp(1j * turns)

  def complex_product(x, phase):
    made = (x[..., :4] + 1j * x[..., 4:]) * phase
    return np.concatenate([made.real, made.imag], axis=-1)

  def ours(x):
    rotation = rope.angles(positions, head_dim=8, theta=100.0)
    rotated = rope.rotate(x, rotation)
    assert rotated.dtype == dtype
    return jnp.sum(rotated.astype(jnp.float32) * upstream), rotated

  with platforms.traced_for(platform):
    gradient, rotated = tiny_model.jit(jax.grad(ours, has_aux=True))(
        jnp.asarray(x, dtype)
    )
  expected = complex_product(x, phase), complex_product(upstream, phase.conj())
  for made, wanted in zip((rotated, gradient), expected, strict=True):
    np.testing.assert_allclose(
        np.asarray(made, np.float32), wanted, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize('platform, is_read_backwards', [
    ('cpu', False), ('gpu', True), ('cuda', True), ('tpu', True)
])
def test_only_an_accelerator_reads_an_axis_backwards(
    platform, is_read_backwards
):
  params = jax.eval_shape(MODEL.init, jax.random.key(0))
  with platforms.traced_for(platform):
    traced = jax.make_jaxpr(MODEL.apply)(params, random_tokens(1, 4))
  assert bool(re.search(r'\brev\[', str(traced))) == is_read_backwards


@pytest.mark.parametrize('norm', [layers.RMSNorm, layers.OffsetRMSNorm])
@pytest.mark.parametrize(
    'dtype, tolerance', [('float32', 1e-5), ('bfloat16', 0.03)]
)
def test_the_gradient_of_a_norm_is_that_of_its_formula(norm, dtype, tolerance):
  offset = 1 if norm is layers.OffsetRMSNorm else 0
  rng = np.random.RandomState(0)
  x, upstream = rng.standard_normal((2, 1, 5, 8)).astype(np.float32)
  scale = 1 - offset + 0.3 * rng.standard_normal(8).astype(np.float32)

  def ours(x, scale):
    module = norm(8, epsilon=1e-6)
    module.scale[...] = scale
    return jnp.sum(module(x.astype(dtype)).astype(jnp.float32) * upstream)

  def formula(x, scale):
    rms = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return jnp.sum(x / rms * (offset + scale)[None, None] * upstream)

  expected = jax.grad(formula, argnums=(0, 1))(x, scale)
  assert min(np.abs(part).max() for part in expected) > 1
  # Of both, and of each beside a constant.
  actual = tiny_model.jit(jax.grad(ours, argnums=(0, 1)))(x, scale)
  tiny_model.assert_trees_close(actual, expected, rtol=0, atol=tolerance)
  for argnum in (0, 1):
    alone = tiny_model.jit(jax.grad(ours, argnums=argnum))(x, scale)
    tiny_model.assert_trees_close(alone, actual[argnum], rtol=0, atol=1e-6)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
  # Added to 256, a 1 is lost in bfloat16.
  table = jnp.ones((3, 2), jnp.bfloat16)
  ids = jnp.zeros((1, 1000), jnp.int32).at[0, 0].set(2)
  total = lambda table: jnp.sum(
      layers.lookup(table, ids).astype(jnp.float32)
  )
  found = tiny_model.jit(jax.grad(total))(table)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(
      found.astype(jnp.float32)[:, 0], [999, 0, 1], rtol=2**-8
  )


def test_the_gradient_of_a_bias_is_summed_in_float32():
  graph, params = nnx.split(layers.Linear(1, 2, bias=True, rngs=nnx.Rngs(0)))
  upstream = jnp.asarray(
      1 + np.random.RandomState(0).standard_normal((64, 256, 2)), jnp.bfloat16
  )

  def total(params):
    out = nnx.merge(graph, params)(jnp.ones((64, 256, 1), jnp.bfloat16))
    return jnp.sum((out * upstream).astype(jnp.float32))

  found = tiny_model.jit(jax.grad(total))(params)['bias'][...]
  # Added up in bfloat16, they are a fifth less.
  expected = np.sum(np.asarray(upstream, np.float64), axis=(0, 1))
  np.testing.assert_allclose(found, expected, rtol=2**-8)


def of_head(product, dtype):
  """Values and gradients of logits, [2, 3, 7], and the types of products."""
  rng = np.random.RandomState(0)
  x = jnp.asarray(rng.standard_normal((2, 3, 5)), dtype)
  kernel, upstream = (
      jnp.asarray(rng.standard_normal(shape), jnp.float32)
      for shape in ((5, 7), (2, 3, 7))
  )
  total = lambda x, kernel: jnp.sum(product(x, kernel) * upstream)
  both = jax.value_and_grad(total, argnums=(0, 1))
  shape = r'tensor<[\dx]*x(\w+)>'
  text = jax.jit(both).lower(x, kernel).as_text()
  return (product(x, kernel), *both(x, kernel)[1]), re.findall(
      rf'dot_general.*: \({shape}, {shape}\) -> {shape}', text
  )


def test_the_gradient_of_a_head_multiplies_in_its_own_type():
  ours = lambda x, kernel: layers.wide_times(x, kernel, x.dtype)
  direct = lambda x, kernel: jnp.matmul(
      x, kernel.astype(x.dtype), preferred_element_type=jnp.float32
  )
  for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.03)):
    found, products = of_head(ours, dtype)
    expected, _ = of_head(direct, dtype)
    assert [x.dtype for x in found] == [jnp.float32, dtype, jnp.float32]
    tiny_model.assert_trees_close(
        *jax.tree.map(lambda x: x.astype(jnp.float32), (found, expected)),
        rtol=0, atol=tolerance,
    )
    short = {'float32': 'f32', 'bfloat16': 'bf16'}[jnp.dtype(dtype).name]
    assert products == 3 * [(short, short, 'f32')]


def test_a_head_that_is_not_trained_has_no_product_for_its_gradient():
  kernel = jnp.ones((5, 7))
  total = lambda x: jnp.sum(layers.wide_times(x, kernel, jnp.float32))
  jaxpr = jax.make_jaxpr(jax.grad(total))(jnp.ones((3, 5)))
  assert str(jaxpr).count('dot_general[') == 2


@pytest.mark.parametrize('model', [
    MODEL, tiny_model.WITH_EXPERTS
], ids=['dense', 'experts'])
def test_rows_that_are_aligned_bring_what_they_bring_where_they_stand(model):
  tokens = jnp.asarray(random_tokens(4, 7))
  mask = jnp.asarray([
      [0, 0, 1, 1, 1, 1, 0], [1] * 7, [0, 0, 0, 0, 0, 1, 1], [0] * 7
  ], bool)
  positions, segment_ids = positions_and_segments(mask)
  params = tiny_model.jit(model.init)(jax.random.key(1))
  replay = (jnp.arange(4 * 7 * 2 * 2).reshape(4, 7, 2, 2) * 7) % 4
  routing = experts.Routing()
  if model.config.num_experts:
    routing = routing._replace(replay=replay, counted=mask)

  def brought(model):
    def total(params):
      hidden, kept = model.trunk(
          params, tokens, positions=positions, segment_ids=segment_ids,
          routing=routing,
      )
      seen = jnp.where(mask[..., None], hidden, 0.0)
      return jnp.sum(seen ** 2), (seen, kept.routed)
    return tiny_model.jit(jax.grad(total, has_aux=True))(params)

  ours = brought(model.replace(aligns_rows=True))
  theirs = brought(model)
  measured = len(jax.tree.leaves(ours[1][1]))
  assert bool(measured) == bool(model.config.num_experts)
  choose = lambda x: (
      jnp.where(mask[..., None], x, 0) if x.shape[:2] == mask.shape else x
  )
  tiny_model.assert_trees_close(
      *jax.tree.map(choose, (ours, theirs)), rtol=1e-4, atol=1e-3
  )


def test_aligned_rows_keep_nothing_that_would_have_to_be_moved_back():
  model = MODEL.replace(aligns_rows=True)
  tokens = jnp.asarray(random_tokens(2, 4))
  with pytest.raises(ValueError, match='keep nothing'):
    model.prefill(tiny_model.params(), tokens, mask=tokens > 0)


def test_aligned_rows_begin_with_their_first_token_and_are_even():
  segment_ids = jnp.asarray([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
  order = alignment.order_of(segment_ids)
  moved = order.move(segment_ids)
  np.testing.assert_array_equal(moved, [[1, 1, 0, 0, 0, 0], [1] * 5 + [0]])
  values = jnp.arange(1.0, 11.0).reshape(2, 5)
  np.testing.assert_array_equal(order.move_back(order.move(values)), values)
  weights = jnp.arange(12.0).reshape(2, 6)
  gradient = jax.grad(lambda x: jnp.sum(order.move(x) * weights))(values)
  np.testing.assert_array_equal(gradient, order.move_back(weights))


def test_bfloat16_computes_in_bfloat16_and_ends_in_float32_logits():
  params, tokens = tiny_model.params(), random_tokens(2, 6)
  exact = apply(MODEL, params, tokens)
  rounded = apply(MODEL.replace(dtype=jnp.bfloat16), params, tokens)
  assert rounded.dtype == jnp.float32
  gap = np.abs(np.asarray(exact - rounded))
  # bfloat16 keeps 8 bits: 1 part in 256 a step, on logits of up to about 6.
  assert 1e-4 < gap.max() < 0.3
