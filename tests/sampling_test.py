"""Every row is sampled honestly, and as if it were alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tiny_model

from dppo_jax import rollout
from dppo_jax import sampling
from dppo_jax.types import Prompts

G, C = tiny_model.GROUP_SIZE, tiny_model.COMPLETION_LENGTH
NUM_ROWS = tiny_model.NUM_PROMPTS * G


def record_logprobs(logits, tokens):
  """A record that must come out equal to the sampler's own log-probs."""
  logprobs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


@functools.cache
def compiled(**options):
  sampler = tiny_model.make_sampler(record=record_logprobs, **options)
  return tiny_model.jit(sampler)


def sample(prompts, keys, **options):
  sampler = compiled(**options)
  return jax.device_get(sampler(tiny_model.params(), prompts, keys))


def repeated(prompts, times):
  return Prompts(*(np.repeat(x, times, axis=0) for x in prompts))


@pytest.fixture(scope='module')
def keys():
  return sampling.row_keys(jax.random.key(3), NUM_ROWS)


@pytest.fixture(scope='module')
def grouped(keys):
  """Four completions of each of four prompts."""
  return sample(tiny_model.prompts(), keys)


def rows_of(completions, rows):
  return jax.tree.map(lambda x: x[rows] if x.ndim else x, completions)


def assert_same_rows(actual, expected):
  for name in ('tokens', 'mask', 'truncated'):
    np.testing.assert_array_equal(
        getattr(actual, name), getattr(expected, name), err_msg=name
    )
  np.testing.assert_allclose(
      actual.logprobs, expected.logprobs, rtol=0, atol=1e-5
  )


# What distribution is sampled.

PROBS = np.array([0.1, 0.4, 0.2, 0.3])


def processed(**options):
  logits = sampling.process_logits(jnp.log(jnp.asarray(PROBS)), **options)
  assert logits.dtype == jnp.float32
  return np.asarray(jax.nn.softmax(logits))


@pytest.mark.parametrize('options, expected', [
    ({'temperature': 1.0}, [0.1, 0.4, 0.2, 0.3]),
    # Squares: 0.01, 0.16, 0.04, 0.09 of 0.30.
    ({'temperature': 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ({'temperature': 0}, [0, 1, 0, 0]),
    # The best two: 0.4 and 0.3 of 0.7.
    ({'temperature': 1.0, 'top_k': 2}, [0, 4 / 7, 0, 3 / 7]),
    ({'temperature': 1.0, 'top_k': 4}, [0.1, 0.4, 0.2, 0.3]),
    # 0.4 < 0.6 <= 0.4 + 0.3: the second one crosses top_p and is kept.
    ({'temperature': 1.0, 'top_p': 0.6}, [0, 4 / 7, 0, 3 / 7]),
    # 0.4 + 0.3 < 0.75 <= 0.9: three.
    ({'temperature': 1.0, 'top_p': 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ({'temperature': 1.0, 'top_p': 1e-6}, [0, 1, 0, 0]),
    # At temperature 0.5 the masses are 16, 9, 4, 1 of 30: 0.53 < 0.6 <= 0.83.
    ({'temperature': 0.5, 'top_p': 0.6}, [0, 16 / 25, 0, 9 / 25]),
    # The best two first, 4/7 = 0.57 >= 0.5: then only the best of them.
    ({'temperature': 1.0, 'top_k': 2, 'top_p': 0.5}, [0, 1, 0, 0]),
])
def test_processed_logits_are_the_hand_numbers(options, expected):
  np.testing.assert_allclose(processed(**options), expected, atol=1e-6)


def test_greedy_takes_the_first_of_equals_and_is_certain_of_it():
  logits = sampling.process_logits(jnp.array([1.0, 3.0, 3.0]), temperature=0)
  np.testing.assert_array_equal(logits, [-np.inf, 0.0, -np.inf])


def test_logits_of_lower_precision_are_processed_in_float32():
  logits = sampling.process_logits(
      jnp.array([1.0, 3.0], jnp.bfloat16), temperature=0.7
  )
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, [1 / 0.7, 3 / 0.7], rtol=1e-6)


# Rows do not know of each other.


def test_a_prompt_shared_by_its_group_gives_what_prompts_of_their_own_give(
    grouped, keys
):
  alone = sample(repeated(tiny_model.prompts(), G), keys, group_size=1)
  assert_same_rows(grouped, alone)


def test_rows_do_not_depend_on_their_batch_mates(grouped, keys):
  prompts = tiny_model.prompts()
  for first in (0, 2):
    two = slice(first, first + 2)
    rows = slice(first * G, (first + 2) * G)
    part = sample(Prompts(prompts.tokens[two], prompts.mask[two]), keys[rows])
    assert_same_rows(part, rows_of(grouped, rows))


def test_rows_do_not_depend_on_the_batch_order(grouped, keys):
  prompts = tiny_model.prompts()
  order = np.array([2, 0, 3, 1])
  rows = (order[:, None] * G + np.arange(G)).ravel()
  shuffled = sample(
      Prompts(prompts.tokens[order], prompts.mask[order]), keys[rows]
  )
  assert_same_rows(shuffled, rows_of(grouped, rows))


def test_a_key_does_not_depend_on_the_number_of_rows():
  key = jax.random.key(5)
  many, few = (
      jax.random.key_data(sampling.row_keys(key, n)) for n in (12, 5)
  )
  np.testing.assert_array_equal(many[:5], few)
  assert len(np.unique(many, axis=0)) == 12


def test_the_members_of_a_group_differ(grouped):
  for rows in grouped.tokens.reshape(-1, G, C):
    assert len(np.unique(rows, axis=0)) > 1


# Where a completion ends.


def test_the_end_token_counts_and_only_padding_follows(grouped):
  ends = np.isin(grouped.tokens, tiny_model.EOS_IDS)
  # Tokens before the first end token, and that token itself.
  until_end = np.cumsum(ends, axis=1) - ends == 0
  np.testing.assert_array_equal(grouped.mask, until_end)
  assert (grouped.tokens[~until_end] == tiny_model.PAD_ID).all()
  assert (grouped.logprobs[~until_end] == 0).all()
  assert (grouped.logprobs[until_end] < 0).all()
  # The fixture would prove little if all ended alike.
  assert len(set(grouped.mask.sum(1))) > 2


def test_truncated_rows_are_those_without_an_end_token(grouped):
  ended = np.isin(grouped.tokens, tiny_model.EOS_IDS).any(1)
  np.testing.assert_array_equal(grouped.truncated, ~ended)
  assert 0 < grouped.truncated.sum() < NUM_ROWS


def test_an_end_token_in_the_last_place_is_not_a_truncation(grouped, keys):
  # Cut off where the row's own end token is: its length is the new limit.
  lengths = np.where(grouped.truncated, 0, grouped.mask.sum(1))
  length = int(lengths.max())
  assert 1 < length
  shorter = sample(tiny_model.prompts(), keys, max_completion_length=length)
  row = int(np.argmax(lengths))
  assert shorter.mask[row].all() and not shorter.truncated[row]
  np.testing.assert_array_equal(shorter.tokens, grouped.tokens[:, :length])


def test_decoding_stops_with_the_longest_completion(keys):
  # A limit of 40 that nobody reaches: half of the tokens end a completion.
  completions = sample(
      tiny_model.prompts(), keys, max_completion_length=40, temperature=3.0,
      eos_ids=tuple(range(1, 33)),
  )
  assert not completions.truncated.any()
  longest = completions.mask.sum(1).max()
  assert 1 < longest == completions.num_steps < 40


def test_a_full_length_completion_takes_every_step(grouped):
  assert grouped.truncated.any() and grouped.num_steps == C


# The log-probs are those of what was sampled.


@functools.cache
def full_forward():
  return tiny_model.jit(tiny_model.MODEL.apply)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_behaviour_logprobs_are_those_of_the_full_forward(temperature, keys):
  prompts = tiny_model.prompts()
  completions = sample(prompts, keys, temperature=temperature)
  rolled = rollout.assemble(prompts, completions, group_size=G)
  logits = full_forward()(
      tiny_model.params(),
      rolled.tokens[:, :-1],
      positions=rolled.positions[:, :-1],
      segment_ids=rolled.segment_ids[:, :-1],
  )
  logprobs = jax.nn.log_softmax(logits / temperature)
  expected = np.take_along_axis(
      np.asarray(logprobs), np.asarray(rolled.tokens[:, 1:, None]), axis=-1
  )[..., 0]
  mask = np.asarray(rolled.token_mask)
  assert mask.sum() == completions.mask.sum()
  np.testing.assert_allclose(
      rolled.behaviour_logprobs[mask], expected[mask], rtol=0, atol=1e-5
  )


def test_a_rollout_lines_completions_up_with_their_prompts(grouped):
  prompts = tiny_model.prompts()
  rolled = jax.device_get(rollout.assemble(prompts, grouped, group_size=G))
  length = tiny_model.PROMPT_LENGTH
  np.testing.assert_array_equal(
      rolled.tokens[:, :length], np.repeat(prompts.tokens, G, axis=0)
  )
  np.testing.assert_array_equal(rolled.tokens[:, length:], grouped.tokens)
  # Index t is about token t + 1, so the first sampled token has index P - 1.
  assert not rolled.token_mask[:, : length - 1].any()
  np.testing.assert_array_equal(rolled.token_mask[:, length - 1 :],
                                grouped.mask)
  # The second prompt has 2 tokens behind 3 of padding.
  np.testing.assert_array_equal(rolled.positions[G, :7], [0, 0, 0, 0, 1, 2, 3]
                                if grouped.mask[G, 1] else
                                [0, 0, 0, 0, 1, 2, 2])
  np.testing.assert_array_equal(
      rolled.segment_ids,
      np.concatenate([np.repeat(prompts.mask, G, 0), grouped.mask], axis=1),
  )


def test_record_sees_the_logits_that_were_sampled(keys):
  completions = sample(tiny_model.prompts(), keys, temperature=0.7)
  np.testing.assert_allclose(
      np.where(completions.mask, completions.record, 0.0),
      completions.logprobs, rtol=0, atol=1e-5,
  )


def one_prompt():
  prompts = tiny_model.prompts()
  return Prompts(prompts.tokens[-1:], prompts.mask[-1:])


@pytest.mark.parametrize('options', [
    {'temperature': 0.7}, {'temperature': 1.0, 'top_k': 9}
], ids=str)
def test_tokens_are_drawn_as_often_as_the_model_says(options):
  num_rows, vocab = 8192, tiny_model.CONFIG.vocab_size
  prompt = one_prompt()
  tokens = sample(
      prompt,
      sampling.row_keys(jax.random.key(4), num_rows),
      group_size=num_rows,
      max_completion_length=1,
      **options,
  ).tokens[:, 0]
  logits, _ = tiny_model.MODEL.prefill(
      tiny_model.params(), prompt.tokens, mask=jnp.asarray(prompt.mask)
  )
  probs = np.asarray(
      jax.nn.softmax(sampling.process_logits(logits[0], **options))
  )
  counts = np.bincount(tokens, minlength=vocab)
  assert not counts[probs == 0].any()
  # Pearson's statistic over the tokens expected at least 5 times, the rest as
  # one cell: mean df, standard deviation sqrt(2 df).
  expected = num_rows * probs
  often = expected >= 5
  cells = [
      np.append(x[often], x[~often].sum()) for x in (counts, expected)
  ]
  statistic = np.sum((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1))
  degrees = often.sum()
  assert degrees >= 8
  assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_one_token_says_nothing_about_the_noise_of_the_next():
  # Without weights all 64 tokens are equally likely: two tokens of a row agree
  # in one row of 64, that is in 64 +- 8 of 4096. One key for both: in all.
  num_rows = 4096
  zeros = jax.tree.map(jnp.zeros_like, tiny_model.params())
  sampler = tiny_model.make_sampler(
      group_size=num_rows, max_completion_length=3, eos_ids=(99,)
  )
  keys = sampling.row_keys(jax.random.key(6), num_rows)
  tokens = np.asarray(tiny_model.jit(sampler)(zeros, one_prompt(), keys).tokens)
  for a, b in ((0, 1), (1, 2), (0, 2)):
    assert 24 < np.sum(tokens[:, a] == tokens[:, b]) < 104
  # Nor do neighbouring rows.
  assert 24 < np.sum(tokens[1:, 0] == tokens[:-1, 0]) < 104


def test_a_nan_draws_a_token_of_the_vocabulary():
  nan = np.nan
  logits = jnp.asarray([[0, nan, 1, 2], [nan] * 4, [0, 1, 2, -np.inf]])
  keys = jax.random.split(jax.random.key(0), 3)
  tokens = np.asarray(sampling.categorical(keys, logits))
  assert np.all((tokens >= 0) & (tokens < [4, 4, 3]))


# 61 are 61 blocks of one token, 131 are one block, 8192 are 128 of 64.
@pytest.mark.parametrize('size', [1, 61, 131, 300, 454, 8192])
def test_tokens_are_drawn_by_their_probability(size):
  num_rows, num_calls = 1000, 200
  logits = 2 * jax.random.normal(jax.random.key(2), (size,))
  logits = logits.at[1::3].set(-jnp.inf)
  rows = jnp.broadcast_to(logits, (num_rows, size))
  keys = jax.random.split(jax.random.key(1), (num_calls, num_rows))
  tokens = jax.jit(
      lambda keys: jax.lax.map(lambda x: sampling.categorical(x, rows), keys)
  )(keys)
  assert tokens.dtype == jnp.int32
  found = np.bincount(np.asarray(tokens).ravel(), minlength=size)
  expected = tokens.size * scipy.special.softmax(np.asarray(logits, np.float64))
  assert found.shape == (size,)
  assert not found[expected == 0].any()
  # Pearson's test, of tokens that are expected five times, and the others.
  often = expected >= 5
  if not often.all():
    found = np.append(found[often], found[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
  some = expected > 0
  result = scipy.stats.chisquare(found[some], expected[some])
  assert size == 1 or result.pvalue > 1e-3
