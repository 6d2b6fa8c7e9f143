r"""Verifiers: answers in a box, your own function, and what goes wrong."""

import importlib.util
import os
import pickle
import re
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.tasks import boxed
from dppo_jax.tasks import math_verifier
from dppo_jax.tasks import own_verifier
from dppo_jax.tasks import scoring

score = math_verifier.boxed_math


# The last box.


@pytest.mark.parametrize('text, content', [
    (r'so \boxed{42}.', '42'),
    (r'\boxed{1} or \boxed{2}', '2'),
    (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{ \{1, 2\} }', r'\{1, 2\}'),
    (r'\boxed{1\\{2}}', r'1\\{2}'),  # A line break, and a brace.
    (r'\boxed{1\\} {2}', r'1\\'),
    (r'\boxed{1\\\{2}', r'1\\\{2'),  # A line break, and an escaped brace.
    (r'\boxed{1\}', None),
    (r'\boxed{\boxed{7}}', '7'),
    (r'\fbox{3}', '3'),
    (r'\boxed {4}', '4'),
    (r'\boxed{}', ''),
    (r'\boxed{1} and \boxed{2', None),
    (r'\boxed 5', None),
    ('42', None),
])
def test_the_last_box_counts_and_must_be_closed(text, content):
  assert boxed.last_boxed(text) == content


def test_a_long_text_of_open_boxes_is_read_in_linear_time():
  # A quadratic search would take minutes; that it returns is the assertion.
  assert boxed.last_boxed(r'\boxed{' * 100_000) is None


# math-verify.


@pytest.mark.parametrize('answer, given', [
    ('72', '72'),
    ('72', '72.0'),
    ('1000', '1,000'),
    ('1,080', '1080'),
    ('1/2', r'\frac{1}{2}'),
    (r'\frac12', '0.5'),
    ('x^2+2x+1', '(x+1)^2'),  # Bare, without dollars.
    ('$x^2+2x+1$', '(x+1)^2'),
    (r'\boxed{72}', '72'),  # The answer of a data set may be boxed.
    ('5', 'x = 5'),
    ('5', r'5\text{ apples}'),
    (r'\text{Evelyn}', 'Evelyn'),
    ('(1, 2)', '(1,2)'),
    ('1, 2', '2, 1'),
    ('10000', r'10\,000'),
    ('1000000', r'1\,000\,000'),
    (r'10\,000', r'10\!000'),
    ('8', '8.'),
    ('8.', '8'),
    ('8', '8. '),
    ('7 or 8', '7 or 8'),  # The answer itself may have alternatives.
    ('50', r'50\%'),
    ('0.5', r'50\%'),
    ('101', '101_2'),
    ('0<x<1', '(0,1)'),  # But not the other way round: see below.
])
def test_what_is_equal_earns_1(answer, given):
  assert score(rf'So the answer is \boxed{{{given}}}.', answer) == 1


@pytest.mark.parametrize('answer, given', [
    ('72', '73'),
    ('1/2', '0.4'),
    ('1, 2', '1'),
    ('7', 'seven'),
    ('7', ''),
    ('7', '.'),
    ('8', '8..'),
    ('78', r'7\\,8'),  # A line break, and a comma.
    ('78', r'7\, 8'),
    ('(0,1)', '0<x<1'),
    (r'\frac{1}{2}', r'\frac{1}{2'),
])
def test_what_is_not_equal_earns_0(answer, given):
  assert score(rf'\boxed{{{given}}}', answer) == 0


@pytest.mark.parametrize('list_of', [
    '{a} or {b}',
    r'{a} \text{{ or }} {b}',
    r'{a} \text{{(or {b})}}',
    '{a} and {b}',
    '{a}, {b}',
    '{a}; {b}',
    '{a} {b}',
    r'{a}\quad {b}',
    r'{a}\,{b}',
    r'{a} \lor {b}',
    r'{a} \vee {b}',
    r'\{{{a}, {b}\}}',
    '[{a}, {b}]',
    '({a}, {b})',
    r'{a}\\{b}',
    '{a} | {b}',
    'x={a}, x={b}',
    r'x={a} \text{{ or }} x={b}',
    r'x \in \{{{a}, {b}\}}',
    r'{a} \text{{, maybe }} {b}',
    r'\$ {a} \$ or \$ {b} \$',
])
def test_a_list_of_guesses_earns_nothing_whichever_is_right(list_of):
  for a, b in ((7, 8), (8, 7)):
    assert score(rf'\boxed{{{list_of.format(a=a, b=b)}}}', '8') == 0


def test_of_a_thousand_characters_and_more_none_is_read():
  for zeros, reward in ((999, 1), (1000, 0)):
    assert score(rf'\boxed{{{"0" * zeros}8}}', '8') == reward


def test_the_full_stop_of_a_delimiter_is_not_that_of_a_sentence():
  half_open = r'\left. x^2 \right.'
  assert math_verifier._NOT_READ.sub('', half_open) == half_open


def test_of_several_boxes_only_the_last_counts():
  assert score(r'\boxed{7} \boxed{8}', '8') == 1
  assert score(r'\boxed{8} \boxed{7}', '8') == 0
  assert score(r'\boxed{8} \boxed{7', '8') == 0


@pytest.mark.parametrize('completion', [
    '8', '#### 8', '<answer>8</answer>', r'$8$', 'The answer is 8.',
])
def test_an_answer_outside_a_box_earns_nothing(completion):
  assert score(completion, '8') == 0


def test_an_answer_that_cannot_be_read_is_an_error_not_a_reward():
  with pytest.raises(ValueError, match="cannot read the answer ''"):
    score(r'\boxed{}', '')


def test_no_signal_is_touched():
  before = signal.getsignal(signal.SIGALRM)
  score(r'\boxed{(x+1)^2}', 'x^2+2x+1')
  assert signal.getsignal(signal.SIGALRM) is before
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_verifier_that_may_hang_runs_in_workers_only():
  with pytest.raises(ValueError, match='may hang.*num_workers=4'):
    scoring.Scorer(scoring.scorer('boxed_math'), num_workers=0)


@pytest.mark.slow
def test_what_hangs_sympy_is_killed_and_counted():
  completions = [
      r'\boxed{42}', r'\boxed{9^{9^{9^{9}}}}', r'\boxed{41}', r'\boxed{42.0}',
  ]
  with scoring.Scorer(score, num_workers=2, timeout_s=5.0) as scorer:
    rewards = scorer.score(completions, ['42'] * 4)
    np.testing.assert_array_equal(rewards, [1, 0, 0, 1])
    assert scorer.take_counts() == {
        'verifier/timeouts': 1, 'verifier/errors': 0, 'verifier/crashes': 0
    }
    # An answer nobody can read is an error of its own kind.
    rewards = scorer.score([r'\boxed{42}', r'\boxed{}'], ['42', ''])
    np.testing.assert_array_equal(rewards, [1, 0])
    assert scorer.take_counts()['verifier/errors'] == 1


# Errors.


def fails_on_b(completion, answer):
  if completion == 'b':
    raise KeyError(answer)
  return completion == answer


def test_an_exception_earns_0_and_is_counted():
  scorer = scoring.Scorer(fails_on_b)
  rewards = scorer.score(['a', 'b', 'c'], ['a', 'b', 'x'])
  np.testing.assert_array_equal(rewards, [1, 0, 0])
  assert (scorer.errors, scorer.crashes, scorer.timeouts) == (1, 0, 0)


def exits_on_b(completion, answer):
  if completion == 'b':
    sys.exit(0)
  return completion == answer


def test_a_verifier_that_exits_earns_0_and_the_run_goes_on(caplog):
  scorer = scoring.Scorer(exits_on_b)
  rewards = scorer.score(['a', 'b', 'b'], ['a', 'b', 'c'])
  np.testing.assert_array_equal(rewards, [1, 0, 0])
  assert scorer.take_counts()['verifier/errors'] == 2
  [message] = caplog.messages  # The first alone.
  assert "SystemExit: 0, for completion 'b' and answer 'b'" in message
  with pytest.raises(ValueError, match='all 2 completions.*SystemExit: 0'):
    scorer.score(['b', 'b'], ['a', 'b'])


def test_who_interrupts_the_run_is_obeyed():
  def interrupted(completion, answer):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    scoring.Scorer(interrupted).score(['a'], ['a'])


def test_counts_are_those_since_the_last_call():
  scorer = scoring.Scorer(fails_on_b)
  for expected in (1, 1):
    scorer.score(['a', 'b'], ['a', 'b'])
    assert scorer.take_counts()['verifier/errors'] == expected
  assert scorer.errors == 2
  assert not any(scorer.take_counts().values())


def test_a_verifier_that_fails_on_a_whole_batch_stops_the_run():
  scorer = scoring.Scorer(fails_on_b)
  message = (
      'all 2 completions that it was shown of a batch; the last time it raised '
      "KeyError: 'y', for completion 'b' and answer 'y'. Call it by hand"
  )
  with pytest.raises(ValueError, match=re.escape(message)):
    scorer.score(['b', 'b'], ['x', 'y'])
  # One alone says little of the verifier, and none says nothing.
  np.testing.assert_array_equal(scorer.score(['b'], ['x']), [0])
  assert scorer.score([], []).shape == (0,)


def test_a_verifier_may_fail_on_the_whole_part_of_one_process():
  # Timeouts, errors, crashes; completions; processes on which all fail, and
  # how many of the completions these had.
  others = np.array([0, 1, 0, 3, 0, 0])
  scorer = scoring.Scorer(fails_on_b, total=lambda x: x + others)
  np.testing.assert_array_equal(scorer.score(['b', 'b'], ['x', 'x']), [0, 0])
  assert scorer.take_counts()['verifier/errors'] == 3
  others = np.array([0, 2, 1, 3, 0, 0])
  scorer = scoring.Scorer(fails_on_b, total=lambda x: x + others)
  with pytest.raises(ValueError, match='failed on all 4 completions'):
    scorer.score(['b'], ['x'])
  others = np.array([1, 2, 0, 3, 0, 0])
  for scored, where in (([], 'in another process'), (['b'], "KeyError: 'x'")):
    scorer = scoring.Scorer(fails_on_b, total=lambda x: x + others)
    with pytest.raises(ValueError, match=f'last time .*{where}') as error:
      scorer.score(scored, ['x'] * len(scored))
    assert '1 took more than config.scoring.timeout_s=10' in str(error.value)


def beside(*others, shown=8):
  """A verifier of one process; others say what theirs did with 8."""
  errors, broken, of_broken = others
  others = np.array([0, errors, 0, shown, broken, of_broken])
  return scoring.Scorer(fails_on_b, total=lambda x: x + others)


def test_a_verifier_that_is_broken_on_one_process_stops_the_run_on_all():
  scorer = beside(3, 0, 0)  # Of 8 elsewhere.
  for answer in 'xyx':
    scorer.score(['b'], [answer])  # One at a time.
  with pytest.raises(ValueError, match='fails on all completions of 1 of the '
                     "processes, and not .* the last time it raised KeyError"):
    scorer.score(['b'], ['y'])
  with pytest.raises(ValueError, match='of 2 of the processes, and not on '
                     'others; the last time in another process'):
    beside(5, 2, 4).score(['a', 'b'], ['x', 'y'])


@pytest.mark.parametrize('elsewhere, batches', [
    # Most fail elsewhere, too: a policy that cannot write yet.
    ((4, 0, 0), [(['b', 'b'], ['x', 'y'])] * 8),
    # One succeeds now and then.
    ((0, 0, 0), [(['bbba'[i % 4], 'b'], ['x', 'y']) for i in range(8)]),
    # The same bad row again and again.
    ((0, 0, 0), [(['b', 'b'], ['x', 'x'])] * 8),
    # All of this process were cut off.
    ((0, 0, 0), [([], [])] * 8),
], ids=['everywhere', 'sometimes', 'row', 'nothing'])
def test_a_verifier_may_fail_for_long_without_being_broken_here(
    elsewhere, batches
):
  scorer = beside(*elsewhere)
  for completions, answers in batches:
    scorer.score(completions, answers)


@pytest.mark.parametrize('reward', [
    None, '1', float('inf'), 1e40, np.float32('nan'), np.ones(1), np.array('1'),
])
def test_a_reward_is_a_finite_number(reward):
  scorer = scoring.Scorer(lambda completion, answer: reward)
  with pytest.raises(ValueError, match=re.escape(
      f"reward is {reward!r} for completion '' and answer 'a'"
  )):
    scorer.score([''], ['a'])


@pytest.mark.parametrize('reward', [
    True, 1, 0.5, np.float32(1), np.float64(0.1), np.int64(-1), np.bool_(0),
    np.array(0.5), np.array(True), jnp.float32(1), jnp.bfloat16(0.5),
])
def test_a_reward_may_be_any_kind_of_number(reward):
  scorer = scoring.Scorer(lambda completion, answer: reward)
  assert scorer.score([''], ['']) == np.float32(reward)


def test_a_verifier_that_no_worker_can_import_is_named():
  def inner(completion, answer):
    return 1.0

  with pytest.raises(ValueError, match=(
      r"config.scoring.num_workers=1, but a worker cannot import the verifier "
      r"'inner' by its name.*local object.*a module, or a file that holds no "
      r'config, and name .* config.task.verifier.*or use num_workers=0\.$'
  )):
    scoring.Scorer(inner, num_workers=1)
  assert scoring.Scorer(inner).score(['a'], ['b']) == 1


def test_a_verifier_of_a_config_file_is_refused_before_workers_start(tmp_path):
  # As ml_collections imports it, under a name that no worker can find.
  path = tmp_path / 'mine.py'
  path.write_text(OWN)
  spec = importlib.util.spec_from_file_location('config_config', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules['config_config'] = module
  try:
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match="cannot import the verifier 'is_right'"
                       r' by its name \(there is no module config_config\)'):
      scoring.Scorer(module.is_right, num_workers=1)
  finally:
    del sys.modules['config_config']


# Your own.


OWN = '''
def is_right(completion, answer):
  """1 for the answer, -1 for nothing."""
  if completion == 'boom':
    raise RuntimeError('as told')
  return -1.0 if not completion else float(completion.strip() == answer)

def with_option(completion, answer, strict=True): return 1.0
def too_few(completion): return 1.0
def too_many(completion, answer, prompt): return 1.0
def keyword(completion, answer, *, prompt): return 1.0
number = 3
'''


@pytest.fixture
def own_file(tmp_path):
  path = tmp_path / 'own_checks.py'
  path.write_text(OWN)
  return path


def test_a_function_of_a_file_is_found_and_called(own_file):
  verifier = own_verifier.load(f'{own_file}:is_right')
  assert [verifier(text, '8') for text in ('8 ', '7', '')] == [1, 0, -1]
  assert own_verifier.load(f'{own_file}:with_option')('', '') == 1


def test_a_path_may_be_relative_and_is_kept_as_absolute(own_file, monkeypatch):
  monkeypatch.chdir(own_file.parent)
  verifier = own_verifier.load('own_checks.py:is_right')
  monkeypatch.chdir('/')
  assert pickle.loads(pickle.dumps(verifier))('8', '8') == 1


def test_a_function_of_a_module_is_found(own_file, monkeypatch):
  monkeypatch.syspath_prepend(own_file.parent)
  assert own_verifier.load('own_checks:is_right')('8', '8') == 1
  assert own_verifier.load('os.path:samefile')


@pytest.mark.parametrize('name, message', [
    ('is_rihgt', "no function 'is_rihgt'. Did you mean 'is_right'"),
    ('number', 'is a int, not a function'),
    ('too_few', 'takes (completion), but it is called with'),
    ('too_many', "called with (completion, answer): missing a required"),
    ('keyword', "missing a required"),
])
def test_what_cannot_be_called_is_named_before_anything_starts(
    own_file, name, message
):
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    own_verifier.load(f'{own_file}:{name}')
  assert f'own_checks.py:{name}' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_verifier_that_cannot_be_imported_is_named(tmp_path):
  with pytest.raises(ValueError, match='neither module:function nor'):
    own_verifier.load('is_right')
  with pytest.raises(FileNotFoundError, match='no file .*nowhere.py'):
    own_verifier.load(f'{tmp_path}/nowhere.py:f')
  with pytest.raises(ValueError, match='ModuleNotFoundError.*no_such_module'):
    own_verifier.load('no_such_module:f')
  (tmp_path / 'broken.py').write_text('1 / 0')
  with pytest.raises(ValueError, match='ZeroDivisionError'):
    own_verifier.load(f'{tmp_path}/broken.py:f')
  (tmp_path / 'leaves.py').write_text('import sys\nsys.exit("no licence")')
  message = 'config.task.verifier=.*leaves.*SystemExit: no licence'
  with pytest.raises(ValueError, match=message) as error:
    own_verifier.load(f'{tmp_path}/leaves.py:f')
  assert '\n' not in str(error.value)
  # Nor is half a module left behind.
  assert not any(name.startswith('_own_verifier_') and 'broken' in str(module)
                 for name, module in sys.modules.items())


BESIDE = """
from __future__ import annotations
import dataclasses
from json import loads
import own_words_beside

@dataclasses.dataclass
class Verdict:
  reward: float

class Odd(ValueError):
  pass

def is_right(completion: str, answer: str) -> float:
  import own_words_used_late
  if completion == 'boom':
    raise Odd(own_words_used_late.WORD)
  return Verdict(own_words_beside.right(completion, answer)).reward
"""


@pytest.fixture
def file_beside_others(tmp_path, monkeypatch):
  # As a package has its name, it must not be found in the place of it.
  (tmp_path / 'json.py').write_text('')
  (tmp_path / 'own_words_used_late.py').write_text('WORD = "late"')
  (tmp_path / 'own_words_beside.py').write_text(
      'def right(completion, answer): return float(completion == answer)'
  )
  (tmp_path / 'own_beside.py').write_text(BESIDE)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  yield tmp_path / 'own_beside.py'
  for name in ('own_words_beside', 'own_words_used_late'):
    sys.modules.pop(name, None)


def test_a_file_may_hold_dataclasses_and_import_what_lies_beside_it(
    file_beside_others
):
  verifier = own_verifier.load(f'{file_beside_others}:is_right')
  assert [verifier(text, '8') for text in ('8', '7')] == [1, 0]
  with pytest.raises(ValueError, match='late'):
    verifier('boom', '8')
  assert sys.path[-1] == str(file_beside_others.parent)
  assert 'own_beside' not in sys.modules  # It takes nobody's name.


@pytest.mark.slow
def test_what_lies_beside_a_file_is_found_in_workers_too(file_beside_others):
  verifier = own_verifier.load(f'{file_beside_others}:is_right')
  sys.path.remove(str(file_beside_others.parent))  # They inherit the list.
  with scoring.Scorer(verifier, num_workers=1) as scorer:
    rewards = scorer.score(['8', '7', 'boom'], ['8'] * 3)
    np.testing.assert_array_equal(rewards, [1, 0, 0])
    assert scorer.errors == 1
    # Its classes have the same name there and here.
    with pytest.raises(ValueError, match='Odd: late'):
      scorer.score(['boom'] * 2, ['8'] * 2)


@pytest.mark.slow
def test_a_function_of_a_file_runs_in_workers(own_file):
  verifier = own_verifier.load(f'{own_file}:is_right')
  with scoring.Scorer(verifier, num_workers=1) as scorer:
    rewards = scorer.score(['8', 'boom', ''], ['8', '8', '8'])
    np.testing.assert_array_equal(rewards, [1, 0, -1])
    assert scorer.errors == 1


SLOW_TO_IMPORT = """
import time
time.sleep(3)
count = 0
def count_calls(completion, answer):
  global count
  count += 1
  return count
"""


@pytest.mark.slow
def test_a_worker_imports_a_verifier_once_and_before_time_counts(tmp_path):
  (tmp_path / 'slow.py').write_text(SLOW_TO_IMPORT)
  verifier = own_verifier.load(f'{tmp_path}/slow.py:count_calls')
  with scoring.Scorer(verifier, num_workers=1, timeout_s=2.0) as scorer:
    rewards = scorer.score([''] * 3, [''] * 3)
    # Each import would start to count anew.
    np.testing.assert_array_equal(rewards, [1, 2, 3])
    assert scorer.timeouts == 0


def platform_of_jax(completion, answer):
  del completion, answer
  return float(os.environ['JAX_PLATFORMS'] == 'cpu')


@pytest.mark.slow
def test_workers_stay_off_accelerators(monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  with scoring.Scorer(platform_of_jax, num_workers=1) as scorer:
    assert scorer.score([''], ['']) == [1]
