"""The task math: published data sets from files, folders and libraries.

The rows have the fields of the published sets; their values are made up here.
"""

import json
import re
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dppo_jax import tasks
from dppo_jax.tasks import readers

GSM8K = [
    {
        'question': f'Ann has {n} pens and buys {n + 1}. How many are there?',
        'answer': f'She has {n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>'
                  f'{2 * n + 1} pens.\n#### {2 * n + 1:,}',
    }
    for n in range(600, 620)
]
MATH = [
    {
        'problem': f'What is $\\frac{{1}}{{{n}}}$?',
        'level': 'Level 1',
        'solution': f'Not \\boxed{{{n}}} but $\\boxed{{\\frac{{1}}{{{n}}}}}$.',
        'type': 'Algebra',
    }
    for n in range(2, 12)
]
DAPO = [
    {
        'data_source': 'math_dapo',
        'prompt': [{'role': 'user', 'content': f'Problem {n // 3}?'}],
        'ability': 'MATH',
        'reward_model': {'ground_truth': str(n // 3), 'style': 'rule'},
        'extra_info': {'index': f'{n}'},
    }
    for n in range(30)  # Each problem three times.
]
AIME = [{'id': n, 'problem': f'Find {n}.', 'answer': n} for n in range(5)]


def write(path, rows):
  if path.suffix == '.parquet':
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return str(path)


def build(train, test=None, **options):
  test = {'test': test} if test else {'held_out': 0.2}
  return tasks.build('math', train=full(train), **{
      name: full(value) if name == 'test' else value
      for name, value in (test | options).items()
  })


def full(options):
  """With the defaults of the other fields, as a config has them."""
  return tasks.config('math').train.to_dict() | options


def prompts_of(source):
  return [row['prompt'] for row in source]


@pytest.mark.parametrize('suffix', ['.jsonl', '.parquet'])
def test_gsm8k_from_files(tmp_path, suffix):
  files = [
      {'name': write(tmp_path / f'{split}{suffix}', rows),
       'extract': 'after_hashes'}
      for split, rows in (('train', GSM8K[:15]), ('test', GSM8K[15:]))
  ]
  task = build(*files, instruction='Box it.')
  assert len(task.train) == 15 and len(task.test) == 5
  assert task.train[0] == {
      'prompt': 'Ann has 600 pens and buys 601. How many are there?\nBox it.',
      'answer': '1,201',
  }
  assert task.score(r'\boxed{1201}', '1,201') == 1
  assert task.score('#### 1201', '1,201') == 0


def test_math_takes_the_last_box_of_the_solution(tmp_path):
  name = write(tmp_path / 'math.parquet', MATH)
  task = build({
      'name': name, 'question': 'problem', 'answer': 'solution',
      'extract': 'last_boxed',
  })
  [row] = [r for r in [*task.train, *task.test] if '{7}' in r['prompt']]
  assert row['answer'] == r'\frac{1}{7}'
  assert task.score(r'\boxed{1/7}', row['answer']) == 1


def test_dapo_has_nested_fields_messages_and_repeats_itself(tmp_path):
  train = {
      'name': write(tmp_path / 'dapo.parquet', DAPO), 'question': 'prompt',
      'answer': 'reward_model.ground_truth',
  }
  test = {'name': write(tmp_path / 'aime.jsonl', AIME), 'question': 'problem'}
  task = build(train, test, instruction='Box it.')
  assert len(task.train) == 10
  assert task.train[3] == {
      'prompt': [{'role': 'user', 'content': 'Problem 3?\nBox it.'}],
      'answer': '3',
  }
  assert task.test[4] == {'prompt': 'Find 4.\nBox it.', 'answer': '4'}


def test_a_problem_of_the_test_set_is_not_learned(tmp_path):
  again = [GSM8K[3] | {'question': '  ' + GSM8K[3]['question'] + '\n'}]
  task = build(
      {'name': write(tmp_path / 'a.jsonl', GSM8K), 'extract': 'after_hashes'},
      {'name': write(tmp_path / 'b.jsonl', again), 'extract': 'after_hashes'},
  )
  assert len(task.train) == 19 and len(task.test) == 1
  assert not any('603 pens' in prompt for prompt in prompts_of(task.train))


def test_a_held_out_share_stays_the_same_when_rows_are_added(tmp_path):
  def parts(rows):
    path = write(tmp_path / 'rows.jsonl', rows)
    task = build({'name': path, 'extract': 'after_hashes'}, held_out=0.3)
    return set(prompts_of(task.train)), set(prompts_of(task.test))

  train, test = parts(GSM8K)
  assert train and test and not train & test
  assert len(train | test) == 20
  fewer_train, fewer_test = parts(GSM8K[5:])
  assert fewer_train < train and fewer_test < test


def test_long_questions_are_left_out(tmp_path):
  rows = [{'question': 'x' * n, 'answer': n} for n in range(1, 11)]
  options = {'name': write(tmp_path / 'a.jsonl', rows)}
  test = {'name': write(tmp_path / 'b.jsonl', [{'question': 'y', 'answer': 1}])}
  task = build(options, test, max_question_chars=4, instruction='')
  assert prompts_of(task.train) == ['x', 'xx', 'xxx', 'xxxx']
  with pytest.raises(ValueError, match='none is left.*max_question_chars=1'):
    build(
        {'name': write(tmp_path / 'c.jsonl', rows[5:])}, test,
        max_question_chars=1,
    )


def test_answers_may_be_numbers(tmp_path):
  rows = [{'question': str(x), 'answer': x} for x in (7, -3, 2.5, 1234567.0)]
  path = write(tmp_path / 'a.jsonl', rows)
  task = build({'name': path}, held_out=0.4)
  answers = {row['answer'] for row in [*task.train, *task.test]}
  assert answers == {'7', '-3', '2.5', '1234567'}


def test_your_own_verifier_and_another_scorer(tmp_path):
  (tmp_path / 'own.py').write_text('def f(text, answer): return 0.25')
  options = {
      'name': write(tmp_path / 'a.jsonl', GSM8K), 'extract': 'after_hashes'
  }
  own = build(options, verifier=f'{tmp_path}/own.py:f')
  assert own.score('', '1') == 0.25
  assert build(options, scorer='exact').score(' 1,201', '1,201') == 1


@pytest.mark.parametrize('rows, options, message', [
    (GSM8K, {'question': 'problem'},
     "row 1: There is no field 'problem'; there is question, answer."),
    (DAPO, {'question': 'prompt', 'answer': 'reward_model.truth'},
     "no field 'reward_model.truth'; in 'reward_model' there is ground_truth"),
    (DAPO, {'question': 'prompt', 'answer': 'ability.x'},
     "in 'ability' there is a str"),
    (GSM8K, {'extract': 'last_boxed'},
     "row 1: answer '.*#### 1,201' holds nothing for extract='last_boxed'"),
    (GSM8K, {'extract': 'boxed'}, "Unknown extract 'boxed'. Did you mean"),
    ([{'question': 'a', 'answer': True}], {}, 'row 1: answer True must be'),
    ([{'question': 'a', 'answer': float('nan')}], {}, 'answer nan must be'),
    ([{'question': 'a', 'answer': float('-inf')}], {}, 'answer -inf must be'),
    ([{'question': 'a', 'answer': ' '}], {}, 'holds nothing'),
    ([{'question': ' ', 'answer': 'a'}], {}, "row 1: question ' ' must be"),
    ([{'question': [{'role': 'user'}], 'answer': 'a'}], {}, 'list of messages'),
])
def test_a_row_that_does_not_fit_is_named(tmp_path, rows, options, message):
  path = write(tmp_path / 'rows.jsonl', rows)
  with pytest.raises(ValueError, match=message) as error:
    build({'name': path} | options)
  assert '\n' not in str(error.value)


def test_what_is_wrong_with_a_file_is_named(tmp_path):
  def fails(name, error, message, text=None):
    if text is not None:
      (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
      build({'name': str(tmp_path / name)})

  fails('nowhere.parquet', FileNotFoundError, 'no file .*nowhere.parquet')
  fails('a.csv', ValueError, 'neither .parquet nor .jsonl', 'a,b')
  fails('a.parquet', ValueError, 'a.parquet is not a Parquet file', 'a,b')
  fails('empty.jsonl', ValueError, 'empty.jsonl has no rows', '\n\n')
  fails('b.jsonl', ValueError, 'b.jsonl, line 2: not JSON',
        json.dumps(GSM8K[0]) + '\n{')
  fails('c.jsonl', ValueError, 'c.jsonl, line 1: is a list', '[1]')
  none = pyarrow.table({'question': pyarrow.array([], pyarrow.string())})
  pyarrow.parquet.write_table(none, tmp_path / 'none.parquet')
  fails('none.parquet', ValueError, 'none.parquet has no rows')


def test_what_is_wrong_with_the_options_is_named():
  with pytest.raises(ValueError, match='no config.task.train.name'):
    tasks.build('math')
  with pytest.raises(ValueError, match='held_out=1.5'):
    tasks.build('math', held_out=1.5)
  with pytest.raises(ValueError, match="held_out=0.1 and .*name='b' both"):
    build({'name': 'a'}, {'name': 'b'}, held_out=0.1)
  with pytest.raises(ValueError, match="'hub2'. Did you mean 'hub'"):
    build({'source': 'hub2', 'name': 'x'})
  with pytest.raises(ValueError, match="'gsm8'. Did you mean 'gsm8k'"):
    tasks.math.preset('gsm8')


# Libraries.


@pytest.fixture(scope='module')
def tfds_folder(tmp_path_factory):
  """A small gsm8k as TFDS prepares it: the four fields of its builder."""
  import tensorflow_datasets as tfds

  class Gsm8k(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      fields = ('question', 'answer', 'annotation', 'short_answer')
      return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(
              {name: tfds.features.Text() for name in fields}
          ),
      )

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(GSM8K[:15]),
              'test': self._generate_examples(GSM8K[15:])}

    def _generate_examples(self, rows):
      for i, row in enumerate(rows):
        annotation, short = row['answer'].split('#### ')
        yield i, row | {'annotation': annotation, 'short_answer': short}

  folder = tmp_path_factory.mktemp('tfds')
  builder = Gsm8k(data_dir=folder, file_format='array_record')
  builder.download_and_prepare()
  return folder


def test_a_prepared_tfds_folder_is_read_without_tensorflow(tfds_folder):
  options = tasks.math.preset('gsm8k_tfds')
  for part in options.values():
    part['name'] = str(tfds_folder / 'gsm8k' / '1.0.0')
  task = tasks.build('math', **options)
  assert len(task.train) == 15 and len(task.test) == 5
  assert {row['answer'] for row in task.test} == {
      f'{2 * n + 1:,}' for n in range(615, 620)
  }
  assert 'tensorflow' not in sys.modules


def test_a_prepared_tfds_data_set_is_found_by_its_name(tfds_folder):
  """`gsm8k` itself: its builder is not imported without TensorFlow."""
  options = tasks.math.preset('gsm8k_tfds')
  task = tasks.build('math', **options, data_dir=str(tfds_folder))
  assert len(task.train) == 15 and len(task.test) == 5
  options['test']['split'] = 'train[:10%]'
  task = tasks.build('math', **options, data_dir=str(tfds_folder))
  assert len(task.test) == 2 and len(task.train) == 13


def test_a_tfds_data_set_that_is_not_there_is_named(tfds_folder):
  with pytest.raises(ValueError, match="Cannot read 'no_such_set'") as error:
    build({'source': 'tfds', 'name': 'no_such_set', 'split': 'train'})
  assert '\n' not in str(error.value)
  folder = str(tfds_folder / 'gsm8k' / '1.0.0')
  with pytest.raises(ValueError, match="split 'dev' with TensorFlow Datasets"):
    build({'source': 'tfds', 'name': folder, 'split': 'dev'})


class FakeDatasets:
  """As much of the package `datasets` as is called; notes the call."""

  def __init__(self, splits):
    self.splits = splits
    self.calls = []

  def load_dataset(self, name, config, *, split, cache_dir):
    self.calls.append((name, config, split, cache_dir))
    return self.splits[split]


def test_a_preset_asks_the_hub_for_the_published_names(monkeypatch):
  fake = FakeDatasets({'train': GSM8K[:15], 'test': GSM8K[15:]})
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  task = tasks.build('math', **tasks.math.preset('gsm8k'), data_dir='/cache')
  assert fake.calls == [
      ('openai/gsm8k', 'main', 'train', '/cache'),
      ('openai/gsm8k', 'main', 'test', '/cache'),
  ]
  assert len(task.train) == 15 and task.train[0]['answer'] == '1,201'


# Rows as each preset's data sets have them: split -> rows.
ROWS = {
    'gsm8k': {'train': GSM8K[:15], 'test': GSM8K[15:]},
    'math': {
        'train': MATH,
        'test': [{'problem': 'P?', 'solution': 's', 'answer': '2',
                  'subject': 'Algebra', 'level': 2, 'unique_id': 'test/1'}],
    },
    'dapo_math_17k': {
        'train': [
            {'prompt': 'A', 'solution': '1'},  # DAPO-Math-17k-Processed
            {'problem': 'B', 'answer': '2', 'prompt': 'B', 'solution': '2'},
        ],
    },
    'aime': {
        'train': [{'ID': '1983-1', 'Year': 1983, 'Problem Number': 1,
                   'Question': 'Q?', 'Answer': '60', 'Part': None}],
        'test': [{'problem': 'P?', 'answer': '70', 'id': '0'}],
    },
}


@pytest.mark.parametrize('name', sorted(ROWS))
def test_a_preset_reads_the_published_fields(monkeypatch, name):
  monkeypatch.setitem(sys.modules, 'datasets', FakeDatasets(ROWS[name]))
  options = tasks.math.preset(name)
  if name == 'dapo_math_17k':  # Both parts have a split called train.
    options['test'] = options['train'] | {'split': 'test'}
    sys.modules['datasets'].splits['test'] = [{'prompt': 'C', 'solution': '3'}]
  task = tasks.build('math', **options)
  assert len(task.train) and len(task.test)
  for row in [*task.train, *task.test]:
    assert row['prompt'].endswith(tasks.math.INSTRUCTION)
    assert task.score(rf'\boxed{{{row["answer"]}}}', row['answer']) == 1


def test_a_data_set_without_rows_or_with_a_failure_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', FakeDatasets({'train': []}))
  hub = {'source': 'hub', 'name': 'a/b', 'split': 'train'}
  with pytest.raises(ValueError, match="Split 'train' of a/b has no rows"):
    build(hub)
  with pytest.raises(ValueError, match="load 'a/b', .*split 'dev' .*Key"):
    build(hub | {'split': 'dev'})


@pytest.mark.parametrize('source, name, package, extra', [
    ('hub', 'a/b', 'datasets', 'hub'),
    ('file', 'a.parquet', 'pyarrow.parquet', 'parquet'),
])
def test_a_missing_package_names_its_extra(
    tmp_path, monkeypatch, source, name, package, extra
):
  if source == 'file':
    name = write(tmp_path / name, GSM8K)
  monkeypatch.setitem(sys.modules, package, None)
  message = re.escape(f"pip install 'dppo_jax[{extra}]'")
  with pytest.raises(ImportError, match=message):
    build({'source': source, 'name': name})


def test_math_verify_that_is_missing_names_its_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'math_verify', None)
  monkeypatch.delitem(sys.modules, 'dppo_jax.tasks.math_verifier', False)
  monkeypatch.delattr('dppo_jax.tasks.math_verifier', raising=False)
  path = write(tmp_path / 'a.jsonl', GSM8K)
  with pytest.raises(ImportError, match=r"install 'dppo_jax\[verifiers\]'"):
    build({'name': path, 'extract': 'after_hashes'})


@pytest.mark.slow
def test_a_local_folder_is_read_by_the_datasets_package(tmp_path_factory):
  pytest.importorskip('datasets')
  # Not tmp_path: it says "test", which the package takes for a split.
  tmp_path = tmp_path_factory.mktemp('rows')
  write(tmp_path / 'train.jsonl', GSM8K[:15])
  write(tmp_path / 'test.jsonl', GSM8K[15:])
  options = tasks.math.preset('gsm8k')
  for part in options.values():
    part |= {'name': str(tmp_path), 'config': ''}
  task = tasks.build('math', **options, data_dir=str(tmp_path / 'cache'))
  assert len(task.train) == 15 and len(task.test) == 5
  assert task.test[0]['answer'] == '1,231'
  options['test']['split'] = 'dev'
  with pytest.raises(ValueError, match="Cannot load .*split 'dev'") as error:
    tasks.build('math', **options, data_dir=str(tmp_path / 'cache'))
  assert '\n' not in str(error.value)


# The config.


def test_a_preset_is_printed_and_each_of_its_fields_can_be_set():
  config = tasks.config('math', **tasks.math.preset('gsm8k'))
  assert config.train.name == 'openai/gsm8k' and config.test.split == 'test'
  config.update_from_flattened_dict({'train.source': 'file'})
  assert config.train.source == 'file' and config.test.source == 'hub'
  with pytest.raises(AttributeError, match='Did you mean "split"'):
    config.train.spilt = 'x'
  # Two configs share nothing, though their default is one dictionary.
  assert tasks.config('math').train.source == 'file'
  assert tasks.config('math').train.name == ''


@pytest.mark.parametrize('path, value', [
    ('a', 1), ('b.c', 2), ('b.d.1', 4), ('e.0.f', 5), ('g.h', 6),
])
def test_a_field_may_lie_deep(path, value):
  row = {'a': 1, 'b': {'c': 2, 'd': [3, 4]}, 'e': [{'f': 5}], 'g': {'h': 6}}
  assert readers.field(row, path) == value


def test_values_of_tfds_become_pythons_own():
  row = {'a': b'\xc3\xa9', 'b': np.int64(3), 'c': np.array([b'x', b'y'])}
  assert readers._decoded(row) == {'a': 'é', 'b': 3, 'c': ['x', 'y']}
