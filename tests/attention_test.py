"""Attention of long rows in blocks is attention of whole rows."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from dppo_jax.models import attention
from dppo_jax.models import gemma2

LENGTH = 50
MODELS = {
    'full': tiny_model.MODEL,
    'sliding': tiny_model.MODEL.replace(config=dataclasses.replace(
        tiny_model.CONFIG, sliding_window=7,
        layer_types=('sliding_attention', 'full_attention'),
    )),
    'capped': tiny_model.MODEL.replace(
        family=gemma2,
        config=dataclasses.replace(
            tiny_model.CONFIG, model_type='gemma2', attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0, hidden_act='gelu_pytorch_tanh',
        ),
    ),
}


def rows():
  """A left-padded sequence; and prompts, their completions, and padding."""
  segments = np.zeros((2, LENGTH), np.int32)
  prompts, positions = np.zeros_like(segments), np.zeros_like(segments)
  segments[0, 6:] = 1
  positions[0, 6:] = np.arange(LENGTH - 6)
  start = 0
  for segment, (size, prompt, offset) in enumerate([
      (5, 0, 0), (9, 1, 5), (11, 1, 5), (4, 0, 0), (13, 4, 4)
  ], 1):
    where = slice(start, start + size)
    segments[1, where], prompts[1, where] = segment, prompt
    positions[1, where] = offset + np.arange(size)
    start += size
  tokens = np.random.RandomState(0).randint(0, 64, segments.shape)
  return tokens, dict(
      positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments),
      prompt_ids=jnp.asarray(prompts),
  )


def outputs(model, params, weights):
  """Hidden states of real tokens, and the gradient of a sum of them."""
  tokens, where = rows()
  real = np.asarray(where['segment_ids']) > 0

  def total(params):
    hidden, _ = model.trunk(params, jnp.asarray(tokens), **where)
    return jnp.sum(jnp.where(real[..., None], hidden, 0) * weights), hidden

  gradient, hidden = tiny_model.jit(jax.grad(total, has_aux=True))(params)
  return np.asarray(hidden)[real], gradient


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('block, stretches', [(8, 4), (16, 1), (50, 2)])
def test_blocks_of_queries_see_what_whole_rows_see(
    monkeypatch, name, block, stretches
):
  model = MODELS[name]
  params = tiny_model.jit(model.init)(jax.random.key(0))
  weights = np.random.RandomState(1).normal(size=(2, LENGTH, 32))
  whole = outputs(model, params, weights)
  monkeypatch.setattr(attention, 'LONG_ROW', LENGTH - 1)
  monkeypatch.setattr(attention, 'BLOCK', block)
  monkeypatch.setattr(attention, 'NUM_STRETCHES', stretches)
  assert_same(outputs(model, params, weights), whole)


@pytest.mark.parametrize('name', MODELS)
def test_stretches_of_a_row_see_what_the_whole_row_sees(monkeypatch, name):
  model = MODELS[name]
  params = tiny_model.jit(model.init)(jax.random.key(0))
  weights = np.random.RandomState(1).normal(size=(2, LENGTH, 32))
  assert num_scores(model) == 1
  whole = outputs(model, params, weights)
  monkeypatch.setattr(attention, 'SHORTEST_STRETCH', LENGTH // 3)
  assert num_scores(model) == 3
  assert_same(outputs(model, params, weights), whole)


def num_scores(model):
  """Into how many products the scores of a layer are split."""
  tokens, where = rows()
  params = jax.eval_shape(model.init, jax.random.key(0))
  text = str(jax.make_jaxpr(
      lambda params: model.trunk(params, jnp.asarray(tokens), **where)[0]
  )(params))
  return text.count('= exp ')


def assert_same(actual, expected):
  """Hidden states, and gradients up to their size."""
  (actual, gradients), (hidden, gradient) = actual, expected
  assert np.abs(hidden).max() > 0.1 and np.isfinite(hidden).all()
  np.testing.assert_allclose(actual, hidden, rtol=0, atol=1e-5)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
  tiny_model.assert_trees_close(
      gradients, gradient, rtol=1e-4, atol=1e-5 * largest
  )


def test_a_long_row_has_no_array_of_all_pairs():
  length = 2 * attention.LONG_ROW

  def sizes(model):
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(params, tokens, positions, segments):
      hidden, _ = model.trunk(
          params, tokens, positions=positions, segment_ids=segments
      )
      return jnp.sum(hidden)

    params = jax.eval_shape(model.init, jax.random.key(0))
    text = tiny_model.jit(jax.grad(total)).lower(
        params, shape, shape, shape
    ).compile().as_text()
    shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', text)
    return max(math.prod(map(int, x.split(','))) for x in set(shapes))

  heads = tiny_model.CONFIG.num_attention_heads
  for name in ('full', 'sliding'):
    assert sizes(MODELS[name]) <= heads * attention.BLOCK * length


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_of_attention_are_those_that_jax_makes_of_its_formula(dtype):
  _, where = rows()
  visible = attention.visible_within_segments(
      attention.Where(
          where['segment_ids'], where['positions'], where['prompt_ids']
      ),
      window=None,
  )
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, heads: jax.random.normal(key, (2, LENGTH, heads, 8))
  weights = normal(keys[3], 4)
  arguments = [
      normal(key, heads).astype(dtype)
      for key, heads in zip(keys[:3], (4, 2, 2), strict=True)
  ]

  def ours(q, k, v):
    attend = attention.attend_within_row(visible, scale=0.3, cap=2.0)
    return jnp.sum(attend(q, k, v)[0] * weights)

  def formula(q, k, v):
    wide = lambda x: jnp.repeat(x.astype(jnp.float32), 4 // x.shape[2], axis=2)
    scores = jnp.einsum('bthe,bshe->bhts', wide(q), wide(k))
    scores = 2.0 * jnp.tanh(0.3 * scores / 2.0)
    scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1)
    return jnp.sum(jnp.einsum('bhts,bshe->bthe', shares, wide(v)) * weights)

  gradient = lambda f: tiny_model.jit(jax.grad(f, argnums=(0, 1, 2)))
  tolerance = {'float32': 1e-5, 'bfloat16': 5e-2}[dtype]
  for actual, expected in zip(
      gradient(ours)(*arguments), gradient(formula)(*arguments), strict=True
  ):
    assert actual.dtype == dtype
    actual, expected = (x.astype(jnp.float32) for x in (actual, expected))
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance
    )
