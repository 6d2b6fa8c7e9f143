"""The logs of a run: what is written, what a kill and a resume leave of it."""

import io
import json
import math
import re
import struct
import sys
import tracemalloc
import types

from absl import logging
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import metrics


def lines_of(workdir, name='metrics.jsonl'):
  return (workdir / name).read_text(encoding='utf-8').splitlines()


def steps_of(workdir):
  return [row['step'] for row in metrics.read(workdir)]


def write_steps(workdir, first, last, **options):
  with metrics.MetricsWriter(workdir, tensorboard=False, **options) as writer:
    for step in range(first, last + 1):
      writer.write(step, {'loss': 0.5 * step})
      writer.write_samples(step, [sample(f'completion {step}')])


def sample(completion, reward=1.0):
  return {
      'split': 'eval',
      'prompt': 'What is 1 + 1?',
      'completion': completion,
      'answer': '2',
      'reward': reward,
  }


def test_writes_one_json_object_a_line(tmp_path):
  write_steps(tmp_path, 1, 3)
  rows = [json.loads(line) for line in lines_of(tmp_path)]
  assert rows == [{'step': s, 'loss': 0.5 * s} for s in (1, 2, 3)]


def test_a_line_is_on_disk_before_the_writer_closes(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {'loss': 0.5})
  assert steps_of(tmp_path) == [1]
  writer.close()


def test_scalars_of_numpy_and_jax_are_numbers(tmp_path):
  scalars = {
      'float32': np.float32(0.5),
      'bfloat16': jnp.asarray(1.5, jnp.bfloat16),
      'int32': jnp.asarray(7, jnp.int32),
      'bool': np.True_,
  }
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(np.int64(3), scalars)
  expected = {'step': 3, 'float32': 0.5, 'bfloat16': 1.5, 'int32': 7, 'bool': 1}
  assert json.loads(lines_of(tmp_path)[0]) == expected


def test_non_finite_values_stay_parseable_by_strict_json(tmp_path):
  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {'nan': math.nan, 'inf': jnp.inf, 'loss': 1.0})
    writer.write_samples(1, [sample('two', reward=math.nan)])
  (line,) = lines_of(tmp_path)
  row = json.loads(line, parse_constant=refuse)
  assert row == {'step': 1, 'nan': None, 'inf': None, 'loss': 1.0}
  json.loads(lines_of(tmp_path, 'samples.jsonl')[0], parse_constant=refuse)
  (read,) = metrics.read(tmp_path)
  assert math.isnan(read['nan']) and math.isnan(read['inf'])


def test_a_step_written_in_parts_reads_as_one(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {'loss': 1.0})
    writer.write(2, {'loss': 2.0})
    writer.write(2, {'eval/avg@8': 0.5})
  assert metrics.read(tmp_path) == [
      {'step': 1, 'loss': 1.0},
      {'step': 2, 'loss': 2.0, 'eval/avg@8': 0.5},
  ]


def test_a_new_writer_appends(tmp_path):
  write_steps(tmp_path, 1, 2)
  write_steps(tmp_path, 3, 4)
  assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_truncate_after_drops_exactly_the_later_lines(tmp_path):
  write_steps(tmp_path, 1, 5)
  before = lines_of(tmp_path)
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.truncate_after(3)
    assert lines_of(tmp_path) == before[:3]
    writer.write(4, {'loss': -1.0})
  assert [row['loss'] for row in metrics.read(tmp_path)] == [0.5, 1, 1.5, -1]
  assert [row['step'] for row in metrics.read_samples(tmp_path)] == [1, 2, 3]


def test_a_torn_last_line_is_dropped_and_does_not_swallow_the_next(tmp_path):
  write_steps(tmp_path, 1, 3)
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-5])
  assert steps_of(tmp_path) == [1, 2]
  write_steps(tmp_path, 3, 4)
  assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_line_that_grows_while_it_is_read_is_no_bad_one(
    tmp_path, monkeypatch
):
  write_steps(tmp_path, 1, 2)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  path.write_bytes(whole[:-5])
  parse = json.loads

  def loads(line):
    if not line.endswith(b'\n'):
      path.write_bytes(whole)  # The run writes the rest.
    return parse(line)

  monkeypatch.setattr(metrics.json, 'loads', loads)
  assert steps_of(tmp_path) == [1]
  assert steps_of(tmp_path) == [1, 2]


def test_columns_are_the_rows_key_by_key(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(2, {'loss': 2.0, 'eval/avg@8': 0.5})
    writer.write(1, {'loss': math.nan})
    writer.write(2, {'loss': 3.0})
    writer.write(3, {'tokens': 7})
  steps, series = metrics.read_columns(tmp_path)
  assert steps.tolist() == [1, 2, 3]
  for key in ('loss', 'eval/avg@8', 'tokens'):
    rows = [row for row in metrics.read(tmp_path) if key in row]
    logged, values = series.pop(key)
    assert logged.tolist() == [row['step'] for row in rows]
    np.testing.assert_equal(values, [row[key] for row in rows])
  assert not series


def test_no_resume_holds_a_long_log_in_memory(tmp_path):
  row = {f'some/metric_{i}': 0.123456789 for i in range(100)}
  path = tmp_path / 'metrics.jsonl'
  lines = [json.dumps({'step': i} | row) for i in range(2_000)]
  path.write_text('\n'.join(lines) + '\n{"step": 2000, "so')
  size = path.stat().st_size
  tracemalloc.start()
  try:
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
      writer.truncate_after(1_499)
    _, peak = tracemalloc.get_traced_memory()
    assert peak < size / 10
    tracemalloc.reset_peak()
    metrics.read_columns(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    assert peak < size
  finally:
    tracemalloc.stop()
  assert lines_of(tmp_path) == lines[:1_500]


def test_samples_of_a_step_are_read_alone(tmp_path):
  write_steps(tmp_path, 3, 5)
  write_steps(tmp_path, 4, 4)
  assert metrics.steps_with_samples(tmp_path) == [3, 4, 5]
  rows = metrics.read_samples(tmp_path, step=4)
  assert rows == [{'step': 4, **sample('completion 4')}] * 2


def test_a_bad_line_elsewhere_is_named(tmp_path):
  write_steps(tmp_path, 1, 3)
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text().replace('"step": 2', '"step" 2'))
  with pytest.raises(ValueError, match=r'metrics\.jsonl:2 is not JSON'):
    metrics.read(tmp_path)


@pytest.mark.skipif(sys.platform != 'linux', reason='Needs /dev/full.')
def test_a_full_disk_is_named_by_file_with_a_way_out(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
  writer._metrics._file = open('/dev/full', 'a', encoding='utf-8')
  message = (
      'metrics.jsonl cannot be written: No space left on device. Free some '
      'space .* the same command goes on from the last checkpoint'
  )
  with pytest.raises(OSError, match=message):
    writer.write(1, {'loss': 0.5})
  with pytest.raises(OSError, match=message):  # Not by a bare number either.
    writer.close()
  assert writer._samples._file.closed  # What comes after it, too.


def test_a_run_without_logs_reads_as_empty(tmp_path):
  assert metrics.read(tmp_path) == []
  assert metrics.read_samples(tmp_path) == []


def test_samples_keep_line_breaks_and_any_unicode(tmp_path):
  completion = 'a\nb\u2028c\r∑ "quoted" \ud83d'  # Ends in half a pair.
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write_samples(2, [sample(completion), sample('other')])
  first, second = metrics.read_samples(tmp_path)
  assert first == {'step': 2, **sample(completion)}
  assert second['completion'] == 'other'


def test_other_processes_write_nothing(tmp_path):
  write_steps(tmp_path / 'run', 1, 2, is_main_process=False)
  with metrics.MetricsWriter(tmp_path, is_main_process=False) as writer:
    writer.truncate_after(0)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'scalars, message',
    [
        ({'x': np.zeros(2)}, r"'x' has shape \(2,\)"),
        ({'x': 'high'}, "'x' is 'high', not a number"),
        ({'step': 3}, 'pass it as the first argument'),
    ],
)
def test_what_is_no_scalar_is_refused_by_name(tmp_path, scalars, message):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match=message):
      writer.write(1, scalars)
  assert metrics.read(tmp_path) == []


def events_of(workdir):
  """TensorBoard events in the order TensorBoard reads them.

  A record is its length (8 bytes), a checksum (4), the event, a checksum (4).
  """
  from tensorboardX.proto import event_pb2

  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      yield event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def test_tensorboard_reads_the_scalars(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'reward/mean': 0.25})
    writer.write(2, {'reward/mean': 0.5})
  scalars = [
      (event.step, value.tag, value.simple_value)
      for event in events_of(tmp_path)
      for value in event.summary.value
  ]
  assert scalars == [(1, 'reward/mean', 0.25), (2, 'reward/mean', 0.5)]


def test_an_event_has_all_values_of_a_line(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(7, {'eval/avg@8': 0.5, 'by_age/2-3/tokens': 3, 'x': math.nan})
  [event] = [e for e in events_of(tmp_path) if e.summary.value]
  assert event.step == 7
  tags, values = zip(*((x.tag, x.simple_value) for x in event.summary.value))
  assert tags == ('eval/avg_8', 'by_age/2-3/tokens', 'x')
  np.testing.assert_equal(values, [0.5, 3, math.nan])


@pytest.mark.skipif(sys.platform != 'linux', reason='Needs /dev/full.')
def test_events_that_a_full_disk_refuses_are_named_and_not_waited_for(
    tmp_path, monkeypatch
):
  from tensorboardX import record_writer

  writer = metrics.MetricsWriter(tmp_path)
  monkeypatch.setattr(
      record_writer, 'open_file', lambda _: open('/dev/full', 'wb', buffering=0)
  )
  with pytest.raises(OSError, match='tensorboard cannot be written: No space'):
    writer.write(1, {'loss': 0.5})
  writer.close()


def test_tensorboard_is_told_to_hide_what_a_resume_repeats(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': 1.0})
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.truncate_after(1)
    writer.write(2, {'loss': 2.0})
  starts = [e.step for e in events_of(tmp_path) if e.HasField('session_log')]
  assert starts == [2]
  # Both files are there: a resume within a second must not overwrite.
  steps = [e.step for e in events_of(tmp_path) if e.summary.value]
  assert steps == [1, 2, 3, 2]


def test_a_missing_wandb_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match=r"pip install 'dppo_jax\[wandb\]'"):
    metrics.MetricsWriter(tmp_path, tensorboard=False, wandb=True)


def test_wandb_continues_the_same_run_on_resume(tmp_path, monkeypatch):
  runs, logged = [], []

  def init(**options):
    runs.append(options)
    return types.SimpleNamespace(
        log=logged.append,
        define_metric=lambda *args, **options: None,
        finish=lambda: None,
    )

  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  for step in (1, 2):
    write_steps(tmp_path, step, step, wandb=True, run_config={'seed': 0})
  assert runs[0]['id'] == runs[1]['id']
  assert runs[0]['config'] == {'seed': 0}
  assert logged == [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 1.0}]


class Stderr(io.StringIO):
  """A stderr that says whether it is a terminal."""

  def __init__(self, terminal):
    super().__init__()
    self.isatty = lambda: terminal


SCALARS = {'reward/mean': 0.4375, 'tokens/s': 12345.6, 'loss': 1.0}


def run_progress(**options):
  with metrics.Progress(3, 1, **options) as progress:
    for step in (1, 2, 3):
      progress.update(step, SCALARS)


@pytest.fixture
def logged(monkeypatch):
  lines = []
  monkeypatch.setattr(
      logging, 'info', lambda text, *args: lines.append(text % args)
  )
  return lines


def test_a_terminal_gets_a_bar_with_reward_speed_and_time_left(
    monkeypatch, logged
):
  monkeypatch.setattr(sys, 'stderr', Stderr(terminal=True))
  run_progress()
  for text in ('3/3', 'reward 0.438', '12,346 tokens/s', '0:00 left'):
    assert text in sys.stderr.getvalue()
  assert logged == []


def test_is_quiet_when_not_a_terminal_but_logs_a_line(monkeypatch, logged):
  monkeypatch.setattr(sys, 'stderr', Stderr(terminal=False))
  run_progress(log_every_s=0)
  assert sys.stderr.getvalue() == ''
  assert logged[0] == 'step 1/3, reward 0.438, 12,346 tokens/s, ? left'
  assert re.fullmatch(r'step 2/3, .* 0:00 left', logged[1])
  assert len(logged) == 3


def test_logs_at_a_modest_rate_and_always_the_last_step(monkeypatch, logged):
  monkeypatch.setattr(sys, 'stderr', Stderr(terminal=False))
  run_progress(log_every_s=3600)
  assert [line.split(',')[0] for line in logged] == ['step 3/3']


def test_time_left_leaves_out_the_compiling_first_step(monkeypatch, logged):
  monkeypatch.setattr(sys, 'stderr', Stderr(terminal=False))
  # Made at 0 s, first step done at 500 s (compiled), second at 510 s: of 400
  # steps 398 remain at 10 s each = 3980 s = 1:06:20.
  clock = iter([0.0, 500.0, 510.0])
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: next(clock))
  progress = metrics.Progress(400, 1)
  progress.update(1, SCALARS)
  progress.update(2, SCALARS)
  assert logged[-1].endswith('1:06:20 left')


def test_the_bar_of_a_resumed_run_starts_where_it_stopped(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Stderr(terminal=True))
  with metrics.Progress(100, 51):
    pass
  assert '50/100' in sys.stderr.getvalue()


def test_other_processes_show_no_progress(monkeypatch, logged):
  monkeypatch.setattr(sys, 'stderr', Stderr(terminal=True))
  run_progress(log_every_s=0, is_main_process=False)
  assert sys.stderr.getvalue() == ''
  assert logged == []
