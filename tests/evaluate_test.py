"""avg@k and pass@k, by hand and by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from dppo_jax import evaluate
from dppo_jax.tasks.prompts import PromptBatch


@pytest.mark.parametrize('n, c, k, expected', [
    (4, 0, 1, 0.0),
    (4, 1, 1, 1 / 4),
    (4, 4, 3, 1.0),
    (4, 2, 2, 5 / 6),  # One of 6 pairs has both wrong: 1 - 1/6.
    (8, 3, 4, 1 - 5 / 70),  # C(5, 4) / C(8, 4).
    (8, 1, 8, 1.0),
    (8, 7, 2, 1.0),  # One wrong sample cannot fill two places.
])
def test_pass_at_k_by_hand(n, c, k, expected):
  actual = evaluate.pass_at_k(num_samples=n, num_correct=c, k=k)
  assert actual == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('n', range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
  for c, k in itertools.product(range(n + 1), range(1, n + 1)):
    samples = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(samples, k))
    expected = sum(map(any, subsets)) / len(subsets)
    actual = evaluate.pass_at_k(num_samples=n, num_correct=c, k=k)
    assert actual == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_stays_exact_where_binomials_overflow_floats():
  # 1 - C(5000, 500) / C(10000, 500), about 1 - 2^-500 or less.
  actual = evaluate.pass_at_k(num_samples=10_000, num_correct=5_000, k=500)
  assert actual == 1.0
  actual = evaluate.pass_at_k(num_samples=10_000, num_correct=1, k=500)
  assert actual == pytest.approx(500 / 10_000)


def test_more_samples_are_needed_than_k():
  with pytest.raises(ValueError, match='k=5 .* num_samples=4'):
    evaluate.pass_at_k(num_samples=4, num_correct=1, k=5)


def test_summary_by_hand():
  # Correct: 2 of 4 and 0 of 4. pass@2 of the first 5/6, pass@4 1.
  rewards = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 0.9, 0.0, 0.0]])
  assert evaluate.summarize(rewards) == {
      'eval/avg@4': pytest.approx(2.9 / 8),  # Partial credit counts here
      'eval/pass@1': pytest.approx(2 / 8),  # and not here.
      'eval/pass@2': pytest.approx(5 / 12),
      'eval/pass@4': pytest.approx(1 / 2),
  }


def test_summary_stops_at_the_number_of_samples():
  assert set(evaluate.summarize(np.ones((2, 3)))) == {
      'eval/avg@3', 'eval/pass@1', 'eval/pass@2'
  }


@pytest.fixture(scope='module')
def evaluation():
  """An evaluation in which a completion is right if it was not truncated."""
  seen = []

  def verify(*, tokens, mask, truncated, answers):
    seen.append({'tokens': tokens, 'mask': mask, 'answers': answers})
    return [str(row.sum()) for row in mask], (~truncated).astype(np.float32)

  prompts = tiny_model.prompts(3)
  evaluate_fn = evaluate.make_evaluate_fn(
      sample=evaluate.make_sample(tiny_model.make_sampler(group_size=2)),
      batch=PromptBatch(prompts, ['a', 'b', 'c'], ['1', '2', '3']),
      num_samples=2,
      verify=verify,
      key=jax.random.key(0),
  )
  with tiny_model.quick_compilation():
    evaluate_fn(tiny_model.params())
  return evaluate_fn, seen


def test_evaluation_verifies_each_completion_against_its_prompts_answer(
    evaluation
):
  evaluate_fn, seen = evaluation
  metrics, samples = evaluate_fn(tiny_model.params())
  call = seen[-1]
  assert call['answers'] == ['1', '1', '2', '2', '3', '3']
  assert samples['prompts'] == ['a', 'a', 'b', 'b', 'c', 'c']
  assert samples['answers'] == call['answers']
  assert samples['completions'] == [str(n) for n in call['mask'].sum(1)]
  assert metrics['eval/avg@2'] == np.mean(samples['rewards'])
  assert metrics['eval/length_mean'] == call['mask'].sum(1).mean()
  assert metrics['eval/truncated'] == pytest.approx(
      1 - metrics['eval/avg@2']
  )


@pytest.mark.parametrize('temperature', [1.0, 0.0])
def test_a_policy_without_finite_logits_is_an_error(temperature):
  evaluate_fn = evaluate.make_evaluate_fn(
      sample=evaluate.make_sample(
          tiny_model.make_sampler(group_size=2, temperature=temperature)
      ),
      batch=PromptBatch(tiny_model.prompts(3), ['a'] * 3, ['1'] * 3),
      num_samples=2,
      verify=None,
      key=jax.random.key(0),
  )
  broken = jax.tree.map(lambda x: x * np.float32(np.nan), tiny_model.params())
  with tiny_model.quick_compilation(), pytest.raises(
      FloatingPointError, match='6 of 6 held-out completions'
  ):
    evaluate_fn(broken)


def test_completions_whose_logits_overflowed_are_counted(caplog):
  of = lambda *values: jnp.array(values)
  evaluate_fn = evaluate.make_evaluate_fn(
      sample=lambda *_: (
          jnp.ones((2, 1), int), jnp.ones((2, 1), bool), of(False, False),
          of(False, True),
      ),
      batch=PromptBatch(tiny_model.prompts(1), ['a'], ['1']),
      num_samples=2,
      verify=lambda **_: (['x', 'y'], np.ones(2)),
      key=jax.random.key(0),
  )
  evaluate_fn(None)
  assert '1 of 2 held-out completions' in caplog.text


def test_evaluation_differs_by_its_parameters_only(evaluation):
  evaluate_fn, seen = evaluation
  first = evaluate_fn(tiny_model.params())
  second = evaluate_fn(tiny_model.params())
  assert first[0] == second[0]
  np.testing.assert_array_equal(seen[-1]['tokens'], seen[-2]['tokens'])
  evaluate_fn(jax.tree.map(lambda x: 0.5 * x, tiny_model.params()))
  assert (seen[-1]['tokens'] != seen[-2]['tokens']).any()
