"""Tasks: data, verifiers, prompts."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from dppo_jax import processes
from dppo_jax import tasks
from dppo_jax.tasks import arithmetic
from dppo_jax.tasks import base
from dppo_jax.tasks import prompts
from dppo_jax.tasks import scoring


class DigitTokenizer:
  """A token for each character; as much of transformers as prompts need."""

  pad_token_id = 0

  def __call__(self, texts, verbose=True, add_special_tokens=True):
    return {'input_ids': [[ord(c) for c in text] for text in texts]}


def numbered(num_rows):
  return [{'prompt': f'{i}=', 'answer': str(i)} for i in range(num_rows)]


def iterator(source, **options):
  options = dict(num_prompts=4, max_prompt_length=8, seed=3) | options
  return prompts.PromptIterator(source, DigitTokenizer(), **options)


def texts_of(batches, num_batches):
  return [text for _ in range(num_batches) for text in next(batches).texts]


def run_python(code, *args, **env):
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, args)],
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | env,
  )


@pytest.mark.parametrize('kind, message', [
  ('training', '3 of digest [0-9a-f]{16}; process 0 6 of digest'),
  ('held-out', '4 of digest [0-9a-f]{16}; process 0 4 of digest'),
])
def test_a_process_that_reads_other_rows_is_refused(monkeypatch, kind, message):
  def read(train, test):
    held_out = prompts.evaluation_batches(
      test, DigitTokenizer(), num_prompts=4, max_prompt_length=8
    )
    return iterator(train), held_out[0]

  changed = [row | {'answer': '7'} for row in numbered(4)]
  theirs = {
    'training': (numbered(3), numbered(4)), 'held-out': (numbered(6), changed)
  }
  told = []
  monkeypatch.setattr(
    prompts.processes, 'gather', lambda x: told.append(x) or [told[0], x]
  )
  ours = read(numbered(6), numbered(4))
  prompts.check_same_rows(*ours)
  prompts.check_same_rows(*ours)
  with pytest.raises(
    ValueError, match=f'Process 1 reads other {kind} rows than .*{message}'
  ):
    prompts.check_same_rows(*read(*theirs[kind]))


# What ends a completion.


class WordTokenizer:
  """A token for each of these texts; the last two are special."""

  texts = ('a', 'b\n', '\n\n', 'c', '</s>', '<end_of_turn>')
  eos_token_id = 4

  def __len__(self):
    return len(self.texts)

  def batch_decode(self, rows, skip_special_tokens):
    assert skip_special_tokens
    return ['' if i >= 4 else self.texts[i] for [i] in rows]

  def get_added_vocab(self):
    return {'</s>': 4, '<end_of_turn>': 5}


def test_every_token_that_holds_a_stop_ends_a_completion():
  assert prompts.end_ids(WordTokenizer()) == (4,)
  assert prompts.end_ids(WordTokenizer(), ['\n']) == (1, 2, 4)
  assert prompts.end_ids(WordTokenizer(), ['b', 'c']) == (1, 3, 4)


def test_a_special_token_may_be_a_stop():
  assert prompts.end_ids(WordTokenizer(), ['<end_of_turn>']) == (4, 5)
  assert prompts.end_ids(WordTokenizer(), ['</s>', 'c']) == (3, 4)


def test_end_tokens_that_the_model_names_end_a_completion_too():
  assert prompts.end_ids(WordTokenizer(), others=(5, 4)) == (4, 5)
  assert prompts.end_ids(WordTokenizer(), ['c'], (5,)) == (3, 4, 5)


@pytest.mark.parametrize('stop', ['ab', '', '</s', '<end'])
def test_a_stop_that_no_token_holds_is_named(stop):
  with pytest.raises(ValueError, match=f'config.stop {stop!r}.*shorter'):
    prompts.end_ids(WordTokenizer(), ['a', stop])


# Few-shot arithmetic.

LINE = re.compile(r'(\d)([-+*])(\d)=(-?\d+)?')


def parsed(text):
  """(a, symbol, b, result) of each line."""
  return [LINE.fullmatch(line).groups() for line in text.split('\n')]


def test_shots_are_solved_and_answers_are_right():
  task = tasks.build('few_shot_arithmetic', operations='+-*', num_shots=2)
  for row in [*task.train, *task.test]:
    *shots, (a, symbol, b, nothing) = parsed(row['prompt'])
    assert len(set(shots)) == 2
    assert nothing is None
    for *problem, result in [*shots, (a, symbol, b, row['answer'])]:
      assert eval(''.join(problem)) == int(result)


def test_test_problems_stand_in_no_prompt_of_train_even_turned_around():
  task = tasks.build('few_shot_arithmetic', operations='+*')
  unordered = lambda line: (*sorted((line[0], line[2])), line[1])
  seen = {
    unordered(line) for row in task.train for line in parsed(row['prompt'])
  }
  asked = {unordered(parsed(row['prompt'])[-1]) for row in task.test}
  assert not seen & asked
  # 45 unordered pairs of 9 digits, for each of two operations.
  assert len(seen | asked) == 2 * 45
  assert 0.15 < len(asked) / (2 * 45) < 0.35
  for row in [*task.train, *task.test]:
    *shots, question = map(unordered, parsed(row['prompt']))
    assert question not in shots


def test_a_question_is_asked_with_different_shots_each_run_the_same():
  make = lambda **options: tasks.build('few_shot_arithmetic', **options)
  few, many = make(num_variants=2), make(num_variants=5)
  assert few.train[:2] == many.train[:2] == make(num_variants=2).train[:2]
  assert len({row['prompt'] for row in many.train}) == len(many.train)
  assert len(many.train) == len(few.train) // 2 * 5


@pytest.mark.parametrize('completion, reward', [
  ('6', 1), ('6\n', 1), (' 6 \n2+2=4', 1), ('6\n\n', 1), ('\n6', 0),
  ('16', 0), ('6.', 0), ('6 apples', 0), ('', 0), ('5\n6', 0),
])
def test_the_first_line_is_the_answer_or_it_is_wrong(completion, reward):
  task = tasks.build('few_shot_arithmetic')
  assert task.score(completion, '6') == reward


@pytest.mark.parametrize('options, message', [
  ({'operations': '+/'}, "operation '/'"),
  ({'operations': ''}, "operation ' '"),
  ({'num_shots': 0}, 'num_shots=0'),
  ({'num_shots': 99}, 'num_shots=99.*at most'),
  ({'num_variants': 0}, 'num_variants=0'),
])
def test_few_shots_that_cannot_be_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    tasks.build('few_shot_arithmetic', **options)


# The arithmetic problems.


def test_train_and_test_are_disjoint_and_cover_all_problems():
  train, test = arithmetic.problems('train'), arithmetic.problems('test')
  train_prompts = {row['prompt'] for row in train}
  test_prompts = {row['prompt'] for row in test}
  assert not train_prompts & test_prompts
  # a+b and a-b with 90 * 90 pairs each, both orders of 8 digits * 90 numbers;
  # what is negative or above 199 is left out.
  pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
  products = [a * digit for a in range(10, 100) for digit in range(2, 10)]
  expected = sum(a + b <= 199 for a, b in pairs)
  expected += sum(a >= b for a, b in pairs)
  expected += 2 * sum(product <= 199 for product in products)
  assert len(train_prompts | test_prompts) == expected
  assert 0.05 < len(test) / expected < 0.15


def test_answers_are_what_python_computes():
  for row in arithmetic.problems('train') + arithmetic.problems('test'):
    assert eval(row['prompt'].rstrip('=')) == int(row['answer'])


def test_tfds_source_equals_the_problems_in_their_order(tmp_path):
  task = tasks.build('arithmetic', data_dir=str(tmp_path))
  assert list(task.train) == arithmetic.problems('train')
  assert list(task.test) == arithmetic.problems('test')
  assert task.train[-1] == arithmetic.problems('train')[-1]
  with pytest.raises(IndexError):
    task.train[len(task.train)]


def test_preparing_happens_once_and_reads_the_same_again(tmp_path):
  first = tasks.build('arithmetic', data_dir=str(tmp_path))
  files = sorted(tmp_path.rglob('*.array_record*'))
  times = [file.stat().st_mtime_ns for file in files]
  second = tasks.build('arithmetic', data_dir=str(tmp_path))
  assert len(files) == 2
  assert [file.stat().st_mtime_ns for file in files] == times
  assert list(first.test) == list(second.test)


PREPARE = """
import sys
from dppo_jax import tasks
task = tasks.build('arithmetic', data_dir=sys.argv[1])
assert len(task.train) == int(sys.argv[2])
"""

KILLED = """
import os, sys
from dppo_jax.tasks import arithmetic, arithmetic_tfds
def generate(self, split):
  for i, row in enumerate(arithmetic.problems(split)):
    if split == 'test' and i == 100:
      os._exit(9)
    yield i, row
arithmetic_tfds.DppoArithmetic._generate_examples = generate
arithmetic_tfds.sources(sys.argv[1])
"""


def test_preparing_survives_a_process_killed_half_way(tmp_path):
  assert run_python(KILLED, tmp_path).returncode == 9
  [left_behind] = (tmp_path / 'dppo_arithmetic').iterdir()
  assert left_behind.name.startswith('incomplete')
  task = tasks.build('arithmetic', data_dir=str(tmp_path))
  assert list(task.test) == arithmetic.problems('test')


def test_processes_may_prepare_at_the_same_time(tmp_path):
  size = str(len(arithmetic.problems('train')))
  command = [sys.executable, '-c', PREPARE, str(tmp_path), size]
  running = [subprocess.Popen(command) for _ in range(3)]
  assert [process.wait() for process in running] == [0, 0, 0]
  assert [d.name for d in (tmp_path / 'dppo_arithmetic').iterdir()] == ['1.0.0']


def test_the_slower_of_two_processes_reads_what_the_faster_wrote(
  tmp_path, monkeypatch
):
  from dppo_jax.tasks import arithmetic_tfds

  problems = arithmetic.problems

  def overtaken(self, split):
    monkeypatch.undo()
    arithmetic_tfds.sources(str(tmp_path))  # The other one, start to end.
    yield from enumerate(problems(split))

  monkeypatch.setattr(
    arithmetic_tfds.DppoArithmetic, '_generate_examples', overtaken
  )
  sources = arithmetic_tfds.sources(str(tmp_path))
  assert list(sources['test']) == problems('test')


def test_preparing_prints_nothing_and_loads_no_tensorflow(tmp_path):
  size = len(arithmetic.problems('train'))
  code = PREPARE + "\nassert not {'tensorflow', 'torch'} & set(sys.modules)"
  done = run_python(code, tmp_path, size)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_data_dir_defaults_to_that_of_tfds(tmp_path):
  size = len(arithmetic.problems('train'))
  done = run_python(
    PREPARE.replace('sys.argv[1]', "''"),
    0,
    size,
    **{'TFDS_DATA_DIR': str(tmp_path)},
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'dppo_arithmetic' / '1.0.0').is_dir()


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='file/sub.*writable folder') as error:
    tasks.build('arithmetic', data_dir=str(tmp_path / 'file' / 'sub'))
  assert '\n' not in str(error.value)


def test_a_folder_with_only_a_part_of_the_data_is_named(tmp_path):
  (tmp_path / 'dppo_arithmetic' / '1.0.0').mkdir(parents=True)
  with pytest.raises(ValueError, match='dppo_arithmetic/1.0.0 is incomplete'):
    tasks.build('arithmetic', data_dir=str(tmp_path))


def test_importing_tasks_imports_nothing_slow():
  slow = (
    'tensorflow',
    'tensorflow_datasets',
    'grain',
    'transformers',
    'pebble',
  )
  code = 'import sys, dppo_jax.tasks as t; print(*sys.modules)'
  imported = run_python(code).stdout.split()
  assert 'dppo_jax.tasks.jsonl' in imported
  assert not set(slow) & set(imported)


def test_every_option_of_a_task_is_in_its_config():
  assert set(tasks.names()) >= {'arithmetic', 'jsonl'}
  assert tasks.config('arithmetic').to_dict() == {
    'name': 'arithmetic',
    'data_dir': '',
    'verifier': '',
    'chat_template': False,
    'system_prompt': '',
  }
  assert tasks.config('jsonl').scorer == 'answer_after_hashes'
  with pytest.raises(ValueError, match="Did you mean 'arithmetic'"):
    tasks.build('aritmetic')


# Rows of a task of one's own.


def a_generator():
  yield {'prompt': '1+1=', 'answer': '2'}


TWO = {'prompt': '1+1=', 'answer': '2'}


@pytest.mark.parametrize('rows, message', [
  (a_generator(), 'test of the task is a generator; make it a list of rows'),
  ({'prompt': ['a'], 'answer': ['2']}, 'test of the task is a dict; make it'),
  ([TWO, '1+1='], r'test\[1\] of the task is a str; a row is {"prompt"'),
  ([TWO, {'question': 'a', 'answer': '2'}],
   r"test\[1\] of the task has no 'prompt', but 'question', 'answer'; a row"),
  ([{'prompt': 'a'}], r"test\[0\] of the task has no 'answer', but 'prompt'"),
  ([{'prompt': 3, 'answer': '2'}], "has as prompt a int, '3'; a row is"),
  ([{'prompt': 'a\ud800', 'answer': '2'}], r"test\[0\].*'a\\ud800' holds"),
])
def test_a_row_that_no_run_can_use_is_named(rows, message):
  task = base.Task([TWO], rows, scoring.exact)
  with pytest.raises(ValueError, match=message):
    prompts.prepare(task, tokenizer=None, max_prompt_length=8)


def test_rows_that_are_texts_stay_where_they_are():
  rows = [TWO]
  task = base.Task(rows, rows, scoring.exact)
  prepared = prompts.prepare(task, tokenizer=None, max_prompt_length=8)
  assert prepared.train is rows and prepared.test is rows


# JSON lines.


GOOD = '{"prompt": "1+1=", "answer": "2"}\n'


def write(path, text):
  path.write_bytes(text.encode() if isinstance(text, str) else text)
  return str(path)


def test_jsonl_reads_strings_and_integers(tmp_path):
  train = write(
    tmp_path / 'a.jsonl', GOOD + '\n{"prompt": "é", "answer": -7, "x": 0}'
  )
  task = tasks.build(
    'jsonl', train_path=train, test_path=write(tmp_path / 'b.jsonl', GOOD)
  )
  assert list(task.train) == [
    {'prompt': '1+1=', 'answer': '2'},
    {'prompt': 'é', 'answer': '-7'},
  ]
  assert task.score('#### -7', '-7') == 1


@pytest.mark.parametrize(
  'line, problem',
  [
    ('{"prompt": "1+1=", "answer"', 'not JSON'),
    ('["1+1=", "2"]', 'is a list'),
    ('{"prompt": "1+1="}', "'answer' is missing; there is prompt"),
    ('{}', "'prompt' is missing"),
    ('{"prompt": 3, "answer": "2"}', 'prompt 3 must be a string'),
    ('{"prompt": "", "answer": "2"}', "prompt '' must be"),
    ('{"prompt": "a", "answer": 1.5}', 'answer 1.5 must be'),
    ('{"prompt": "a", "answer": true}', 'answer true must be .* in quotes'),
    ('{"prompt": "a", "answer": null}', r'answer null must be .* empty\.$'),
    ('{"prompt": "a", "answer": " "}', r'answer " " must be .* empty\.$'),
    (
      '{"prompt": "a", "answer": "Paris"}',
      "'Paris' does not suit.*exact, or your own by config.task.verifier",
    ),
    (b'{"prompt": "\xff", "answer": "2"}', 'not UTF-8'),
    (
      r'{"prompt": "1+1=\ud800", "answer": "2"}',
      r"prompt '1\+1=\\ud800' holds '\\ud800', half of a pair.*leave it out",
    ),
    (
      r'{"prompt": [{"role": "user", "content": "\udc00"}], "answer": "2"}',
      r"prompt '\\udc00' holds",
    ),
    (r'{"prompt": "a", "answer": "\ud800"}', r"answer '\\ud800' holds"),
    (
      '{"prompt": "a", "answer": %s}' % ('1' * 1001),
      r"answer '1{57}\.\.\.' does not suit.*1,001 digits.*at most 1,000 are",
    ),
    ('{"prompt": "a", "answer": "-%s"}' % ('1' * 5000), 'it has 5,000 digits'),
    ('{"prompt": "a", "answer": %s}' % ('1' * 5000), 'more than 4,300 digits'),
  ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, problem):
  line = line if isinstance(line, bytes) else line.encode()
  path = write(tmp_path / 'bad.jsonl', GOOD.encode() * 2 + line)
  with pytest.raises(ValueError, match=f'bad.jsonl, line 3: .*{problem}'):
    tasks.build('jsonl', train_path=path, test_path=path)


def test_an_answer_of_as_many_digits_as_are_read_can_be_earned(tmp_path):
  answer = '-' + '1' * 1000
  paths = [
    write(tmp_path / name, f'{{"prompt": "{name}", "answer": {answer}}}')
    for name in 'ab'
  ]
  task = tasks.build('jsonl', train_path=paths[0], test_path=paths[1])
  assert task.score(f'#### {answer}', task.train[0]['answer']) == 1


def test_for_a_verifier_of_ones_own_an_answer_may_be_any_json(tmp_path):
  verifier = write(
    tmp_path / 'own.py', 'def score(completion, answer): return 1.0'
  )
  answers = ['', '  ', 'Paris', 1.5, None, True, [], {'a': [1]}]
  paths = [
    write(
      tmp_path / name,
      '\n'.join(json.dumps({'prompt': name, 'answer': x}) for x in answers),
    )
    for name in ('a', 'b')
  ]
  task = tasks.build(
    'jsonl',
    train_path=paths[0],
    test_path=paths[1],
    verifier=f'{verifier}:score',
  )
  assert [row['answer'] for row in task.train] == [
    '', '  ', 'Paris', '1.5', 'null', 'true', '[]', '{"a": [1]}'
  ]


def test_jsonl_files_must_be_given_exist_differ_and_hold_rows(tmp_path):
  good = write(tmp_path / 'good.jsonl', GOOD)
  empty = write(tmp_path / 'empty.jsonl', '\n')

  def build(train_path, test_path):
    tasks.build('jsonl', train_path=train_path, test_path=test_path)

  with pytest.raises(ValueError, match='give config.task.train_path'):
    build('', good)
  with pytest.raises(ValueError, match='give config.task.test_path'):
    build(good, '')
  with pytest.raises(ValueError, match='good.jsonl; a policy is not tested'):
    build(good, good)
  with pytest.raises(ValueError, match='empty.jsonl has no rows'):
    build(good, empty)
  with pytest.raises(
      FileNotFoundError, match='config.task.test_path: .* no file .*nowhere'
  ):
    build(good, str(tmp_path / 'nowhere.jsonl'))
  with pytest.raises(FileNotFoundError, match='is a folder; give a file in it'):
    build(good, str(tmp_path))
  with pytest.raises(ValueError, match="Did you mean 'exact'"):
    tasks.build('jsonl', train_path=good, test_path=good, scorer='exakt')


def test_prompts_that_are_learned_and_tested_are_counted_in_a_warning(
  tmp_path, caplog
):
  rows = [
    {'prompt': prompt, 'answer': i}
    for i, prompt in enumerate(
      ['a', 'b', [{'role': 'user', 'content': 'c'}], 'd']
    )
  ]

  def warnings(train, test):
    caplog.clear()
    paths = [
      write(tmp_path / name, '\n'.join(map(json.dumps, part)))
      for name, part in (('a.jsonl', train), ('b.jsonl', test))
    ]
    tasks.build('jsonl', train_path=paths[0], test_path=paths[1])
    return caplog.messages

  [message] = warnings(rows[:3], rows[1:])
  assert re.match('2 of the 3 prompts of .*b.jsonl are in .*a.jsonl', message)
  assert 'accuracy on what was learned from says little' in message
  assert not warnings(rows[:2], rows[2:])


# Verifiers.


@pytest.mark.parametrize(
  'completion, answer, reward',
  [
    ('#### 85', '85', 1),
    ('47+38: 7+8=15.\n#### 85\n', '85', 1),
    ('####85', '85', 1),
    ('#### 085', '85', 1),
    ('#### -5', '-5', 1),
    ('#### 1 #### 85', '85', 1),
    ('x #### 85 y', '85', 0),
    ('#### 85.', '85', 0),
    ('#### 85 86', '85', 0),
    ('#### 5', '-5', 0),
    ('#### - 5', '-5', 0),
    ('#### 185', '85', 0),
    ('### 85', '85', 0),
    ('85', '85', 0),
    ('', '85', 0),
    ('#### ' + '9' * 10_000, '85', 0),
  ],
)
def test_answer_after_hashes_must_end_the_completion(
  completion, answer, reward
):
  assert arithmetic.score(completion, answer) == reward


def test_exact_compares_the_whole_completion():
  assert scoring.exact(' Paris\n', 'Paris') == 1
  assert scoring.exact('Paris.', 'Paris') == 0
  assert scoring.exact('paris', 'Paris') == 0


def test_rewards_are_float32_in_the_order_of_the_completions():
  with scoring.Scorer(scoring.exact) as scorer:
    rewards = scorer.score(['a', 'b', 'c'], ['a', 'x', 'c'])
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [1, 0, 1])
    assert scorer.score([], []).shape == (0,)
    with pytest.raises(ValueError, match='2 completions but 1 answers'):
      scorer.score(['a', 'b'], ['a'])


def test_a_reward_that_is_not_finite_names_completion_and_answer():
  scorer = scoring.Scorer(lambda completion, answer: float(answer))
  message = "nan for completion 'b' and answer 'nan'"
  with pytest.raises(ValueError, match=message):
    scorer.score(['a', 'b'], ['1', 'nan'])


def awkward(completion, answer):
  """Hangs, dies or fails when told to."""
  while completion == 'hang':
    pass
  if completion == 'sleep':
    time.sleep(1e6)
  if completion == 'die':
    os._exit(3)
  if completion == 'fail':
    raise KeyError(answer)
  if completion == 'exit':
    sys.exit()
  return scoring.exact(completion, answer)


@pytest.mark.slow
def test_a_pool_kills_what_hangs_and_counts_it():
  completions = ['a', 'hang', 'sleep', 'b', 'die', 'c']
  answers = ['a', 'hang', 'sleep', 'x', 'die', 'c']
  with scoring.Scorer(awkward, num_workers=2, timeout_s=1.0) as scorer:
    rewards = scorer.score(completions, answers)
    np.testing.assert_array_equal(rewards, [1, 0, 0, 0, 0, 1])
    assert (scorer.timeouts, scorer.crashes) == (2, 1)
    # All workers are well again.
    assert scorer.score(['a'] * 200, ['a'] * 200).sum() == 200
    assert (scorer.timeouts, scorer.crashes) == (2, 1)
    assert scorer.score(['fail', 'a'], ['why', 'a']).tolist() == [0, 1]
    assert scorer.take_counts() == {
      'verifier/timeouts': 2, 'verifier/errors': 1, 'verifier/crashes': 1
    }
    assert not any(scorer.take_counts().values())
    with pytest.raises(ValueError, match='all 4 completions'):
      scorer.score(['die'] * 4, ['a'] * 4)
    assert scorer.score(['a'], ['a']) == [1]
  scorer.close()  # Twice does nothing.


@pytest.mark.slow
def test_a_pool_that_fails_on_a_whole_batch_says_how(caplog):
  with scoring.Scorer(awkward, num_workers=2, timeout_s=1.5) as scorer:
    # The workers are started, and each kind is logged the first time.
    rewards = scorer.score(
      ['a', 'sleep', 'die', 'exit', 'sleep', 'die', 'exit'], ['a', *'123456']
    )
    assert rewards.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert (scorer.timeouts, scorer.crashes, scorer.errors) == (2, 2, 2)
    slow, died, left = caplog.messages
    assert "timeout_s=1.5, for completion 'sleep' and answer '1'" in slow
    assert 'its process died' in died
    assert "for completion 'die' and answer '2'" in died
    assert "SystemExit: , for completion 'exit' and answer '3'" in left
    with pytest.raises(ValueError, match='on all 3 completions') as error:
      scorer.score(['exit', 'sleep', 'die'], ['1', '2', '3'])
    assert '1 took more than config.scoring.timeout_s=1.5' in str(error.value)
    assert "completion 'die' and answer '3'" in str(error.value)
    with pytest.raises(ValueError, match='on all 2 completions') as error:
      scorer.score(['sleep'] * 2, ['1', '2'])
    assert '2 took more than config.scoring.timeout_s' in str(error.value)
    with pytest.raises(ValueError, match='on all 2 completions') as error:
      scorer.score(['exit'] * 2, ['1', '2'])
    assert 'timeout_s' not in str(error.value)
    # Of one alone it cannot be told whether the verifier works.
    assert scorer.score(['sleep'], ['1']) == [0]


# Prompts.


def test_prompts_are_padded_on_the_left():
  encoded = prompts.encode(['12', '345'], DigitTokenizer(), max_prompt_length=4)
  np.testing.assert_array_equal(
    encoded.tokens, [[0, 0, 49, 50], [0, 51, 52, 53]]
  )
  np.testing.assert_array_equal(
    encoded.mask, [[False, False, True, True], [False, True, True, True]]
  )
  assert (encoded.tokens.dtype, encoded.mask.dtype) == (np.int32, np.bool_)


def test_a_prompt_that_is_too_long_or_empty_is_named():
  def encode(text):
    prompts.encode(
      ['1', text],
      DigitTokenizer(),
      max_prompt_length=4,
      source_name='train.jsonl',
    )

  encode('1234')
  message = "train.jsonl: prompt '12345' has 5 tokens.*max_prompt_length=4; "
  with pytest.raises(ValueError, match=message + 'raise config.max_prompt'):
    encode('12345')
  with pytest.raises(ValueError, match=r"'1{57}\.\.\.' has 999 tokens"):
    encode('1' * 999)
  with pytest.raises(ValueError, match="prompt '' has no tokens"):
    encode('')


def test_a_long_prompt_is_found_before_training_starts():
  source = numbered(50) + [{'prompt': '123456789', 'answer': '1'}]
  with pytest.raises(ValueError, match="^1 of 51 to learn from are too long, "
                     "the longest: prompt '123456789' has 9 tokens"):
    iterator(source)


def test_a_batch_holds_the_texts_and_answers_of_its_tokens():
  batch = next(iterator(numbered(20)))
  assert batch.prompts.tokens.shape == (4, 8)
  for tokens, mask, text, answer in zip(
    *batch.prompts, batch.texts, batch.answers, strict=True
  ):
    assert ''.join(map(chr, tokens[mask])) == text == f'{answer}='


def test_the_order_follows_from_the_seed():
  source = numbered(20)
  first = texts_of(iterator(source), 8)
  assert first == texts_of(iterator(source), 8)
  assert first != texts_of(iterator(source, seed=4), 8)


def test_epochs_reshuffle_and_cover_every_row():
  # 10 rows in batches of 4: 5 batches are two epochs, the third straddles.
  seen = texts_of(iterator(numbered(10)), 5)
  everything = sorted(row['prompt'] for row in numbered(10))
  assert sorted(seen[:10]) == everything
  assert sorted(seen[10:]) == everything
  assert seen[:10] != seen[10:]


def test_a_batch_may_be_larger_than_the_source():
  assert len(next(iterator(numbered(3), num_prompts=8)).texts) == 8


@pytest.mark.parametrize('position', [0, 1, 3, 7])
def test_a_restored_iterator_gives_exactly_the_batches_that_followed(position):
  uninterrupted = iterator(numbered(10))
  texts_of(uninterrupted, position)
  state = json.loads(json.dumps(uninterrupted.get_state()))
  expected = [next(uninterrupted) for _ in range(6)]
  fresh, used = iterator(numbered(10)), iterator(numbered(10))
  texts_of(used, 5)
  for restored in (fresh, used):
    restored.set_state(state)
    for batch in expected:
      again = next(restored)
      assert (again.texts, again.answers) == (batch.texts, batch.answers)
      np.testing.assert_array_equal(again.prompts.tokens, batch.prompts.tokens)
      np.testing.assert_array_equal(again.prompts.mask, batch.prompts.mask)
    assert restored.get_state() == uninterrupted.get_state()


def test_a_batch_that_was_read_ahead_counts_as_not_read():
  plain, ahead = iterator(numbered(10)), iterator(numbered(10))
  for _ in range(6):
    state = ahead.get_state()
    ahead.prefetch()
    ahead.prefetch()  # One at most.
    assert ahead.get_state() == state == plain.get_state()
    assert next(ahead).texts == next(plain).texts
  state = ahead.get_state()
  expected = texts_of(ahead, 2)
  ahead.prefetch()
  ahead.set_state(state)
  assert texts_of(ahead, 2) == expected


def test_a_position_of_another_run_is_refused():
  state = iterator(numbered(10)).get_state()
  with pytest.raises(ValueError, match='num_prompts=4, now it is 5'):
    iterator(numbered(10), num_prompts=5).set_state(state)
  with pytest.raises(ValueError, match='num_rows=10, now it is 11'):
    iterator(numbered(11)).set_state(state)
  for field in ('prompt', 'answer'):
    rows = numbered(10)
    rows[7][field] = '5'
    with pytest.raises(ValueError, match='with rows=.* data of config.task'):
      iterator(rows).set_state(state)
  del state['rows']  # Of a run from before there was one.
  iterator(rows).set_state(state)


class Counted:
  """Rows that note which of them were read."""

  def __init__(self, rows):
    self.rows, self.read = rows, []

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    self.read.append(i)
    return self.rows[i]


def test_processes_read_their_rows_of_the_batch_that_one_would_read():
  whole = iterator(numbered(10))
  sources = [Counted(numbered(10)) for _ in range(2)]
  first, second = (
    iterator(
      source, share=processes.Share(held=np.array(held), own=np.array(own))
    )
    # Row 2 is on devices of both, and the second scores it.
    for source, held, own in zip(
      sources, ([0, 2], [1, 2, 3]), ([0], [1, 2, 3]), strict=True
    )
  )
  for source in sources:
    source.read.clear()  # All rows are looked at before the first batch.
  for _ in range(4):
    batch, ours, theirs = next(whole), next(first), next(second)
    assert ours.texts + theirs.texts == batch.texts
    assert ours.answers + theirs.answers == batch.answers
    tokens = batch.prompts.tokens
    np.testing.assert_array_equal(ours.prompts.tokens, tokens[[0, 2]])
    np.testing.assert_array_equal(theirs.prompts.tokens, tokens[1:])
  assert [len(source.read) for source in sources] == [4 * 2, 4 * 3]
  # Whoever continues may be another number of processes.
  assert first.get_state() == whole.get_state()


def test_a_source_without_rows_is_refused():
  with pytest.raises(ValueError, match='no prompts: the source has 0 rows'):
    iterator([])


def test_evaluation_takes_the_same_distinct_prompts_each_time():
  def batches(num_prompts, batch_size=None):
    return prompts.evaluation_batches(
      numbered(10),
      DigitTokenizer(),
      num_prompts=num_prompts,
      max_prompt_length=4,
      batch_size=batch_size,
    )

  assert batches(5)[0].texts == ['0=', '2=', '4=', '6=', '8=']
  assert [len(batch.texts) for batch in batches(10, 4)] == [4, 4, 2]
  assert len({text for b in batches(7, 2) for text in b.texts}) == 7
  with pytest.raises(ValueError, match='are 10 prompts.*not num_prompts=11'):
    batches(11)


def test_a_tokenizer_of_transformers_gives_the_same_layout():
  tokenizers = pytest.importorskip('tokenizers')
  transformers = pytest.importorskip('transformers')
  words = {'<pad>': 0, '<eos>': 1, 'one': 2, 'two': 3}
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=_whitespace_tokenizer(tokenizers, words),
    pad_token='<pad>',
    eos_token='<eos>',
  )
  encoded = prompts.encode(['one two', 'two'], tokenizer, max_prompt_length=3)
  np.testing.assert_array_equal(encoded.tokens, [[0, 2, 3], [0, 0, 3]])


def _whitespace_tokenizer(tokenizers, words):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return tokenizer
