"""Problems of reasoning-gym: apart, deterministic, judged in full."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from dppo_jax import tasks
from dppo_jax.tasks import reasoning_gym
from dppo_jax.tasks import scoring

ONE_DIGIT = json.dumps({
    'min_terms': 2, 'max_terms': 2, 'min_digits': 1, 'max_digits': 1
})


def build(dataset='chain_sum', **options):
  options = dict(train_size=40, test_size=10) | options
  return tasks.build('reasoning_gym', dataset=dataset, **options)


def answer_of(row):
  return json.loads(row['answer'])['answer']


def test_problems_follow_from_the_seed():
  assert build().train == build().train
  assert build().train != build(seed=1).train


def test_problems_are_the_same_in_any_process():
  # One draws from Python's global random numbers, one goes through sets.
  program = (
      'from dppo_jax import tasks\n'
      "for name in 'list_functions', 'ransom_note':\n"
      "  task = tasks.build('reasoning_gym', dataset=name, train_size=40)\n"
      '  print(task.train)'
  )
  made = {
      subprocess.run(
          [sys.executable, '-c', program], capture_output=True, check=True,
          env=os.environ | {'PYTHONHASHSEED': hash_seed},
      ).stdout
      for hash_seed in '12'
  }
  assert len(made) == 1


@pytest.mark.parametrize('seed', range(5))
def test_no_problem_is_in_two_parts_even_where_there_are_few(seed):
  # 200 problems at most: 400 draws hold most of them.
  task = build(
      dataset_options=ONE_DIGIT, train_size=400, test_size=30, num_shots=3,
      seed=seed, instruction='',
  )
  split = [
      [row['prompt'].splitlines()[-1] for row in part]
      for part in (task.train, task.test)
  ]
  shots = [
      line.rpartition('= ')[0] + '=' for line in
      task.train[0]['prompt'].splitlines()[:-1]
  ]
  split.append(shots)
  everything = [question for part in split for question in part]
  assert len(shots) == 3
  assert len(split[0]) > 80 and len(split[1]) > 20
  assert len(everything) == len(set(everything))


def test_shots_are_solved_and_the_same_for_all():
  task = build(
      dataset_options=ONE_DIGIT, num_shots=2, instruction='',
      answer_in='first_line',
  )
  shots = {tuple(row['prompt'].splitlines()[:-1]) for row in task.train}
  [lines] = shots
  for line in lines:
    expression, answer = line.rpartition(': ')[-1].split(' = ')
    assert eval(expression) == int(answer)
  assert task.train[0]['prompt'].endswith('=')


def test_shots_show_the_form_of_the_answer():
  task = build(dataset_options=ONE_DIGIT, num_shots=1)
  question, asked, *_ = task.test[0]['prompt'].splitlines()
  assert question.endswith('=')
  assert asked.startswith(reasoning_gym.INSTRUCTION + ' <answer>')
  assert task.test[0]['prompt'].endswith('\n' + reasoning_gym.INSTRUCTION)


@pytest.mark.parametrize('dataset', [
    'chain_sum', 'countdown', 'list_functions', 'letter_counting',
    'simple_equations', 'acre',
])
def test_the_answer_earns_1_and_nothing_or_another_0(dataset):
  task = build(dataset, train_size=6, test_size=3)
  for row in [*task.train, *task.test]:
    right = answer_of(row)
    assert task.score(f'So <answer> {right} </answer>', row['answer']) == 1
    assert task.score('', row['answer']) == 0
    assert task.score('<answer></answer>', row['answer']) == 0
    assert task.score('<answer>x</answer>', row['answer']) == 0


@pytest.mark.parametrize('answer_in, completion, reward', [
    ('tags', '<answer>{a}</answer>', 1),
    ('tags', '<answer>0.5</answer> <answer>{a}</answer>', 1),
    ('tags', '<answer>{a}</answer> <answer>0.5</answer>', 0),
    ('tags', '<answer>no <answer>{a}</answer>', 1),
    ('tags', '<answer>{a}', 0),
    ('tags', '{a}', 0),
    ('first_line', ' {a}\nmore', 1),
    ('first_line', '\n{a}', 1),
    ('first_line', 'It is {a}', 0),
    ('all', ' {a}\n', 1),
    ('all', '{a}\n{a}', 0),
])
def test_where_the_answer_stands(answer_in, completion, reward):
  task = build(answer_in=answer_in)
  row = task.train[0]
  text = completion.format(a=answer_of(row))
  assert task.score(text, row['answer']) == reward


def test_a_long_text_that_holds_the_answer_earns_partial_credit_only():
  strict, lenient = build(), build(partial_credit=True)
  row = strict.train[0]
  text = f'<answer>it is {answer_of(row)} or so</answer>'
  assert strict.score(text, row['answer']) == 0
  assert 0 < lenient.score(text, row['answer']) < 1


def test_a_problem_without_an_answer_is_judged_by_the_problem():
  task = build('graph_color', train_size=2, test_size=1)
  row = task.test[0]
  assert answer_of(row) is None
  assert task.score('<answer>{}</answer>', row['answer']) == 0
  with pytest.raises(ValueError, match='no answers to show'):
    build('graph_color', train_size=2, test_size=1, num_shots=1)


@pytest.mark.parametrize('dataset', ['countdown', 'list_functions'])
def test_the_verifier_judges_the_same_problem_in_another_process(dataset):
  task = build(dataset, train_size=3, test_size=2)
  row = task.test[-1]
  program = (
      'import pickle, sys\n'
      'score, text, answer = pickle.load(sys.stdin.buffer)\n'
      'print(score(text, answer))'
  )
  text = f'<answer>{answer_of(row)}</answer>'
  done = subprocess.run(
      [sys.executable, '-c', program],
      input=pickle.dumps((task.score, text, row['answer'])),
      capture_output=True, check=True,
  )
  assert done.stdout.split() == [b'1.0']


@pytest.mark.slow
def test_workers_judge():
  task = build(test_size=2)
  with scoring.Scorer(task.score, num_workers=1) as scorer:
    row = task.test[0]
    np.testing.assert_array_equal(
        scorer.score(
            [f'<answer>{answer_of(row)}</answer>', '?'], [row['answer']] * 2
        ),
        [1, 0],
    )


def test_it_runs_in_workers_only():
  with pytest.raises(ValueError, match='may hang'):
    scoring.Scorer(build().score)


def test_your_own_verifier_gets_the_answer_itself(tmp_path):
  (tmp_path / 'own.py').write_text('def f(text, answer): return text == answer')
  task = build(verifier=f'{tmp_path}/own.py:f')
  row = task.train[0]
  int(row['answer'])
  assert task.score(row['answer'], row['answer'])


@pytest.mark.parametrize('options, message', [
    ({'dataset': 'chain_sums'}, "'chain_sums'. Did you mean 'chain_sum'"),
    ({'dataset_options': '{"min_term": 2}'}, "argument 'min_term'"),
    ({'dataset_options': '{"min_terms": 9, "max_terms": 2}'}, 'max_terms must'),
    ({'dataset_options': 'min_terms=2'}, 'is not JSON'),
    ({'dataset_options': '{"seed": 2}'}, 'without seed and size'),
    ({'answer_in': 'tag'}, "Did you mean 'tags'"),
    ({'test_size': 0}, 'test_size=0 must be at least 1'),
    ({'seed': -1}, 'seed=-1 must be at least 0'),
    ({'dataset_options': ONE_DIGIT, 'train_size': 1, 'test_size': 5000},
     'lower test_size=5000'),
])
def test_a_mistake_is_named_in_one_line(options, message):
  with pytest.raises(ValueError, match=message) as error:
    build(**options)
  assert '\n' not in str(error.value)


def test_a_missing_package_names_its_extra(monkeypatch):
  reasoning_gym._data_set.cache_clear()
  reasoning_gym._problems.cache_clear()
  monkeypatch.setitem(sys.modules, 'reasoning_gym', None)
  with pytest.raises(ImportError, match=r"install 'dppo_jax\[reasoning-gym\]'"):
    build()
