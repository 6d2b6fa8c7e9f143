"""A head in chunks: as at once, and no array of the size of all logits."""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import whole_step

from dppo_jax import chunks
from dppo_jax import divergences
from dppo_jax import target
from dppo_jax.types import Rows

VOCAB, CHUNK = 151_936, 32
NUM_PROMPTS, G, P, C = 4, 4, 8, 40


def sizes_of_step(chunk_size, **options):
  """Elements of the largest array of a whole step, its temporary bytes."""
  model = tiny_model.MODEL.replace(
      config=dataclasses.replace(tiny_model.CONFIG, vocab_size=VOCAB)
  )
  compiled = whole_step.compile_step(
      model, num_prompts=NUM_PROMPTS, group_size=G, max_prompt_length=P,
      max_completion_length=C, learner__num_minibatches=1,
      learner__chunk_size=chunk_size, **options,
  )
  shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', compiled.as_text())
  return (
      max(math.prod(map(int, x.split(','))) for x in set(shapes)),
      compiled.memory_analysis().temp_size_in_bytes,
  )


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    {},
    {'sampling__num_slots': 8},
    {'sampling__num_slots': 8, 'learner__row_length': 64},
    {'learner__share_prompts': True},
    {'learner__reuse_forward': True},
    {'anchor': 'recomputed'},
    {'anchor': 'recomputed', 'learner__reuse_forward': True},
    {'extras__kl_coefficient': 0.1, 'extras__kl_estimator': 'k3'},
    {'extras__kl_coefficient': 0.1, 'extras__kl_estimator': 'full'},
], ids=str)
def test_only_a_chunk_of_logits_exists_at_a_time(options):
  all_logits = NUM_PROMPTS * G * C * VOCAB
  # The embedding is the largest array, then the logits of a chunk.
  limit = VOCAB * max(CHUNK, tiny_model.CONFIG.hidden_size)
  largest, temporary = sizes_of_step(CHUNK, **options)
  assert largest == limit == all_logits / 20
  # Gradients, moments and the sampler's head are as large as the embedding.
  assert temporary < 4 * all_logits


@pytest.mark.slow
def test_without_chunks_they_all_exist():
  # So the test above can fail.
  all_logits = NUM_PROMPTS * G * C * VOCAB
  largest, temporary = sizes_of_step(0)
  assert largest >= all_logits
  assert temporary > 2 * 4 * all_logits


def by_halves(fn):
  """As `sharding.by_tokens`, of two devices with half of the rows each."""

  def run(params, *trees):
    half = lambda start: fn(
        params, *jax.tree.map(lambda x: x[start:start + 2], trees)
    )
    return jax.tree.map(lambda *x: jnp.concatenate(x), half(0), half(2))

  return run


@pytest.mark.parametrize('chunk_size, expected', [
    (0, 2 * 6), (48, 2 * 6), (12, 2 * 6), (7, 7), (4, 4), (1, 1)
])
def test_a_chunk_has_so_many_tokens_of_a_device(chunk_size, expected):
  rows = Rows(
      inputs=jnp.ones((4, 6), jnp.int32),
      targets=jnp.ones((4, 6), jnp.int32),
      token_mask=jnp.ones((4, 6), bool),
      positions=jnp.tile(jnp.arange(6), (4, 1)),
      input_segments=jnp.ones((4, 6), jnp.int32),
      target_segments=jnp.ones((4, 6), jnp.int32),
  )
  seen = []

  def fn(logits, targets):
    del targets
    seen.append(len(logits))
    return jnp.sum(logits, axis=-1)

  token_map = target.make_token_map(
      tiny_model.MODEL.replace(by_tokens=by_halves),
      temperature=1.0,
      chunk_size=chunk_size,
  )
  params = jax.eval_shape(tiny_model.MODEL.init, jax.random.key(0))
  jax.eval_shape(lambda params: token_map(fn, params, rows), params)
  assert set(seen) == {expected}


TOKENS = 11  # Of which 7 were sampled, in chunks of 3.
MASK = jnp.asarray([0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]) > 0


def arguments():
  """heads, hidden [n, D], and trees: a target and a weight of each token."""
  rng = np.random.RandomState(0)
  normal = lambda *shape: np.float32(rng.standard_normal(shape))
  heads = {'kernel': normal(4, 5), 'bias': normal(5)}
  trees = rng.randint(0, 5, TOKENS, np.int32), normal(TOKENS)
  return heads, normal(TOKENS, 4), trees


def of_tokens(heads, hidden, targets, weights):
  """A term of each token, and two arrays beside it."""
  logits = 0.5 + hidden @ heads['kernel'] + heads['bias'][None]
  logprobs = jnp.take_along_axis(
      jax.nn.log_softmax(logits), targets[:, None], axis=-1
  )[:, 0]
  # Where there is no token, this is not 0.
  terms = 1.0 + weights * logprobs**2
  return terms, {'logprobs': logprobs, 'targets': targets}


def at_once(heads, hidden, trees):
  terms, out = of_tokens(heads, hidden, *trees)
  keep = lambda x: jnp.where(MASK, x, 0)
  return jnp.sum(keep(terms)), jax.tree.map(keep, out)


def in_chunks_summed(heads, hidden, trees, chunk_size=3):
  return chunks.summed(of_tokens, chunk_size)(heads, MASK, hidden, trees)


def in_chunks_mapped(heads, hidden, trees, chunk_size=3):
  run = chunks.mapped(lambda *x: of_tokens(*x)[0], chunk_size)
  _, out = at_once(heads, hidden, trees)
  terms = run(heads, MASK, hidden, trees)
  return jnp.sum(jnp.where(MASK, terms, 0)), out


@pytest.mark.parametrize('chunk_size', [0, 3, 20])
@pytest.mark.parametrize('run', [in_chunks_summed, in_chunks_mapped])
def test_chunks_give_the_sum_the_arrays_and_the_gradients_of_all_at_once(
    run, chunk_size
):
  run = functools.partial(run, chunk_size=chunk_size)

  def both(fn):
    twice = lambda *x: jax.tree.map(lambda y: 2 * y, fn(*x))
    (total, out), gradients = jax.jit(
        jax.value_and_grad(twice, argnums=(0, 1), has_aux=True)
    )(*arguments())
    if not chunk_size:  # May be anything where none was sampled.
      out = jax.tree.map(lambda x: jnp.where(MASK, x, 0), out)
    return (total, out), gradients

  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  found, expected = both(run), both(at_once)
  jax.tree.map(close, found, expected)
  of_hidden = found[1][1]
  assert not of_hidden[~MASK].any() and (of_hidden[MASK] != 0).all()
  # Without a gradient it is the same.
  total, _ = jax.jit(run)(*arguments())
  close(total, at_once(*arguments())[0])


@pytest.mark.parametrize('run', [in_chunks_summed, in_chunks_mapped])
def test_without_a_sampled_token_all_of_it_is_zero(run, monkeypatch):
  monkeypatch.setitem(globals(), 'MASK', jnp.zeros(TOKENS, bool))
  (total, _), gradients = jax.jit(
      jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
  )(*arguments())
  assert total == 0
  assert not any(x.any() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize('run', [in_chunks_summed, in_chunks_mapped])
@pytest.mark.parametrize('which', ['heads', 'bias', 'hidden'])
def test_a_gradient_is_made_of_what_has_one(run, which):
  heads, hidden, trees = arguments()
  every, of_hidden = jax.grad(
      lambda *x: run(*x, trees)[0], argnums=(0, 1)
  )(heads, hidden)

  def of_one(x):
    changed = {
        'heads': (x, hidden),
        'bias': (heads | {'bias': x}, hidden),
        'hidden': (heads, x),
    }
    return run(*changed[which], trees)[0]

  one = {'heads': heads, 'bias': heads['bias'], 'hidden': hidden}[which]
  expected = {'heads': every, 'bias': every['bias'], 'hidden': of_hidden}
  gradient = jax.jit(jax.grad(of_one))
  jax.tree.map(np.testing.assert_allclose, gradient(one), expected[which])
  # No product of two [3, ...], summed over the tokens, unless the kernel moves.
  text = gradient.lower(one).as_text()
  of_kernel = re.findall(r'dot_general.*-> tensor<4x5xf32>', text)
  of_kernel += re.findall(r'dot_general.*-> tensor<5x4xf32>', text)
  assert bool(of_kernel) == (which == 'heads')


@pytest.mark.parametrize('chunk_size', [0, 3])
def test_what_stands_beside_has_no_gradient(chunk_size):
  heads, hidden, (targets, weights) = arguments()

  def beside(hidden):
    run = functools.partial(in_chunks_summed, chunk_size=chunk_size)
    return jnp.sum(run(heads, hidden, (targets, weights))[1]['logprobs'])

  assert not jax.grad(beside)(hidden).any()
  for run in (in_chunks_summed, in_chunks_mapped):
    by_weights = lambda x, run=run: run(
        heads, hidden, (targets, x), chunk_size=chunk_size
    )[0]
    assert not jax.grad(by_weights)(weights).any()


def judged_by_token(params, hidden, targets):
  """A sum of log-probs and entropies of 16 tokens, in chunks of 4."""
  head_sum = target.make_head_sum(
      tiny_model.MODEL, temperature=1.0, chunk_size=4
  )
  rows = types.SimpleNamespace(
      token_mask=jnp.ones((2, 8), bool), targets=targets
  )

  def of_tokens(logits, targets):
    both = divergences.logprobs_and_entropy(logits, targets)
    return both[0] + both[1], both

  return head_sum(of_tokens, params, hidden, rows)[0]


def test_logits_of_a_chunk_are_made_and_reduced_once_with_their_gradient():
  arguments = (
      tiny_model.params(),
      jnp.ones((2, 8, tiny_model.CONFIG.hidden_size)),
      jnp.zeros((2, 8), jnp.int32),
  )
  both = jax.jit(jax.value_and_grad(judged_by_token, argnums=(0, 1)))
  text = both.lower(*arguments).as_text()
  # Of 4 tokens and 64 words: a maximum, a sum of exponentials, an entropy.
  assert len(re.findall(r'stablehlo\.reduce.*tensor<4x64xf32>', text)) == 3
  # Logits, and what they bring to hidden states and to the head.
  assert len(re.findall(r'dot_general.*-> tensor<4x64xf32>', text)) == 1
  assert len(re.findall(r'dot_general.*tensor<32x64xf32>', text)) == 3
