"""No array of the size of all logits exists in the compiled step."""

import dataclasses
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest
import tiny_model
import whole_step

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
    (0, 2 * 6), (48, 2 * 6), (12, 2 * 6), (6, 2 * 3), (4, 2 * 2), (1, 2)
])
def test_a_chunk_has_so_many_tokens_of_a_device_and_one_of_each_row_at_least(
    chunk_size, expected
):
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


def test_logits_of_a_chunk_are_not_reduced_again_for_their_gradient():
  head_map = target.make_head_map(
      tiny_model.MODEL, temperature=1.0, chunk_size=4
  )
  rows = types.SimpleNamespace(
      token_mask=jnp.ones((2, 8), bool), targets=jnp.zeros((2, 8), jnp.int32)
  )
  hidden = jnp.ones((2, 8, tiny_model.CONFIG.hidden_size))

  def total(params):
    of_tokens = lambda *x: divergences.logprobs_and_entropy(*x)[0]
    return jnp.sum(head_map(of_tokens, params, hidden, rows))

  both = jax.jit(jax.value_and_grad(total))
  text = both.lower(tiny_model.params()).as_text()
  # Of 4 tokens and 64 words: a maximum, a sum of exponentials, an entropy.
  assert len(re.findall(r'stablehlo\.reduce.*tensor<4x64xf32>', text)) == 3
