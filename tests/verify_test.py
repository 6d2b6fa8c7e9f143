"""Sampled tokens to text to rewards: what the scorer sees, what it earns."""

import numpy as np

from dppo_jax.tasks import scoring
from dppo_jax.tasks import verify


class DigitTokenizer:
  """A token for each character; 0 is special."""

  def batch_decode(self, rows, skip_special_tokens):
    assert skip_special_tokens
    return [''.join(chr(i) for i in row if i) for row in rows]


class Spy:
  """A scorer that notes its calls; a reward is the number that it reads."""

  def __init__(self):
    self.calls = []

  def score(self, completions, answers):
    self.calls.append((completions, answers))
    return np.array([float(x) for x in completions], np.float32)


def call(scorer, texts, truncated):
  """Rewards of texts, in rows that are padded with what is not a digit."""
  length = 1 + max(map(len, texts))
  tokens = np.array([[*map(ord, text.ljust(length, '?'))] for text in texts])
  return verify.make_verify_fn(DigitTokenizer(), scorer)(
      tokens=tokens,
      mask=np.arange(length) < np.array([[len(text)] for text in texts]),
      truncated=np.array(truncated),
      answers=[f'answer to {text}' for text in texts],
  )


def test_what_was_cut_off_earns_0_unseen_and_others_keep_their_order():
  spy = Spy()
  texts, rewards = call(
      spy, ['3', '44', '5', '666', '7'], [False, True, False, True, False]
  )
  assert spy.calls == [
      (['3', '5', '7'], ['answer to 3', 'answer to 5', 'answer to 7'])
  ]
  assert rewards.dtype == np.float32
  np.testing.assert_array_equal(rewards, [3, 0, 5, 0, 7])
  assert texts == ['3', '44', '5', '666', '7']


def test_special_tokens_are_no_text():
  texts, _ = call(Spy(), ['1\0', '2'], [False, False])
  assert texts == ['1', '2']


def test_the_scorer_is_called_once_even_if_all_were_cut_off():
  # In a run of several processes each of them waits for the others there.
  spy = Spy()
  texts, rewards = call(spy, ['1', '2'], [True, True])
  assert spy.calls == [([], [])]
  assert texts == ['1', '2']
  assert rewards.dtype == np.float32
  np.testing.assert_array_equal(rewards, [0, 0])


def test_a_verifier_that_fails_on_nothing_has_not_failed_on_all():
  totals = []

  def total(counts):
    totals.append(counts.tolist())
    return counts

  scorer = scoring.Scorer(lambda completion, answer: 1 / 0, total=total)
  _, rewards = call(scorer, ['1', '2'], [True, True])
  np.testing.assert_array_equal(rewards, [0, 0])
  assert totals == [[0] * 6]
  assert not any(scorer.take_counts().values())
