"""Two programs take the steps of one, wherever their devices are.

The tiny Qwen3 on eight devices of a CPU: fused on four of them, and split on
these four, or on four and others that sample.
"""

import collections
import json
import logging
import pathlib
import re
import threading
import types

import jax
from jax.experimental import io_callback
import many_devices
import numpy as np
import pytest
import tiny_model
import whole_step

from dppo_jax import logbook
from dppo_jax import main
from dppo_jax import memory
from dppo_jax import program as program_lib
from dppo_jax import split_step
from dppo_jax import tasks
from dppo_jax import training

LEARNER = {'fsdp': 2, 'tensor': 2}
LAYOUTS = {
    'fused': {},
    'same devices': {'mode': 'split'},
    'same devices, other layout': {
        'mode': 'split', 'sampling__mesh__tensor': 4
    },
    'others': {'mode': 'split', 'sampling__num_devices': 4},
    'others, fewer': {
        'mode': 'split',
        'sampling__num_devices': 2,
        'sampling__mesh__tensor': 1,
        'lora__rank': 2,
    },
    'fused, adapters': {'lora__rank': 2},
}
REFERENCE = {'others, fewer': 'fused, adapters'}
NUM_STALENESS = 3
# Whoever waits for a sampler that waits for it does so for this long.
_PATIENCE_S = 300


class _Compilations(logging.Handler):
  """Names of the functions that XLA compiles."""

  def __init__(self):
    super().__init__()
    self.names = []

  def emit(self, record):
    found = re.search(r'XLA compilation of jit\((\w+)\)', record.getMessage())
    if found:
      self.names.append(found[1])


def on_eight_devices(*names):
  """Prints three steps of each layout for each staleness, and what compiled."""
  for name in names:
    print(json.dumps({'name': name, **_take_steps(name)}))


def _take_steps(name):
  small = whole_step.make_small(
      tiny_model.MODEL, mesh=LEARNER, divergence__k=8, **LAYOUTS[name]
  )
  config, mesh, program = small
  sampled_on = set()
  note = lambda rollout: sampled_on.update(*(
      x.sharding.device_set for x in jax.tree.leaves(rollout)
  ))
  compilations = _Compilations()
  logging.getLogger('jax').addHandler(compilations)
  with jax.log_compiles():
    with tiny_model.quick_compilation():
      arguments = program_lib.abstract_arguments(config, mesh, program)
      program.train_step.lower(*arguments).compile()
    runs = [
        whole_step.take_steps(
            *small, tiny_model.params(), num_blank=1 + k, on_rollout=note
        )
        for k in range(NUM_STALENESS)
    ]
  logging.getLogger('jax').removeHandler(compilations)
  return {
      'runs': runs,
      'compiled': compilations.names,
      'sampled_on': sorted(x.id for x in sampled_on),
  }


def on_two_devices(workdir):
  """A run whose sampler waits until the next learning has been started.

  Fails where a rollout is waited for before that.
  """
  started = collections.defaultdict(threading.Event)  # By policy version.
  config = whole_step.make_config(
      mode='split', sampling__num_devices=1, staleness=1, total_steps=3,
      num_prompts=4, group_size=2, learner__num_minibatches=1,
      max_completion_length=4, eval__num_prompts=2, eval__num_samples=1,
      tensorboard=False,
  )
  folder = pathlib.Path(workdir)
  with config.unlocked():
    config.task = tasks.config('jsonl')
  for name, start in (('train', 0), ('test', 8)):
    rows = [{'prompt': f'1+{i}=', 'answer': i + 1} for i in range(start, 9)]
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in 2 * rows))
    config.task[f'{name}_path'] = str(path)

  def wait(version):
    if 0 < version < config.total_steps:  # Before and after nothing follows.
      assert started[int(version)].wait(_PATIENCE_S), 'waited for the rollout'
    return version

  make_rollout_fn = program_lib.rollout_lib.make_rollout_fn

  def make_waiting(*args, **options):
    rollout_fn = make_rollout_fn(*args, **options)

    def waiting(params, prompts, key, version, products=()):
      version = io_callback(wait, jax.ShapeDtypeStruct((), np.int32), version)
      return rollout_fn(params, prompts, key, version, products)

    return waiting

  program_lib.rollout_lib.make_rollout_fn = make_waiting
  parts = main.build(config)
  learn = parts.train_step.learn

  class Noted:
    """Learns, and tells the sampler of the policy that it started from."""

    lower = learn.lower

    def __call__(self, state, scored):
      version = int(state.policy_version)
      results = learn(state, scored)
      started[version].set()
      return results

  parts = parts._replace(train_step=parts.train_step._replace(learn=Noted()))
  training.train(config, parts, folder / 'run', lambda step: False)
  print(json.dumps(sorted(x for x in started if started[x].is_set())))


def test_what_both_programs_need_of_a_device_is_added_up():
  learn = {'arguments': 100, 'temporary': 50, 'results': 3, 'total': 153}
  sample = {'arguments': 30, 'temporary': 80, 'results': 5, 'total': 115}
  found = lambda *args, **options: memory.of_step(
      types.SimpleNamespace(
          memory_analysis=lambda: split_step.combined(*args, **options)
      )
  )
  # The state and the copy last; temporary memory is used in turns.
  assert found(learn, sample, 20, apart=False) == {
      'arguments': 120, 'temporary': 80, 'results': 8, 'total': 208
  }
  # The fuller of 100 + 20 + 50 + 3 and 30 + 20 + 80 + 5.
  assert found(learn, sample, 20, apart=True) == {
      'arguments': 120, 'temporary': 50, 'results': 3, 'total': 173
  }
  sample['temporary'] += 100
  assert found(learn, sample, 20, apart=True)['total'] == 235


def test_a_sampler_that_goes_on_is_not_waited_for_by_the_logbook():
  rows = {}
  writer = types.SimpleNamespace(write=rows.__setitem__)
  metrics = {
      'tokens/sampled': np.float32(60), 'masked_tokens': np.zeros((2, 8), int),
      'scatter': np.zeros((1, 4)),
  }
  times = {'device_s': 2.0, 'score_s': 1.0}

  class Unfinished:
    """An array that is there only once the next step was started."""

    ready = False

    def __float__(self):
      assert self.ready, 'waited for the sampler'
      return 30.0

  # 30 decode steps of 0.1 s took 3 s, or all of the 2 s if nothing overlaps.
  for overlapping, learn_s, sample_s in ((True, 2.0, 3.0), (False, 0.0, 2.0)):
    steps = Unfinished()
    book = logbook.Logbook(
        writer, vocab_size=8, seconds_per_decode_step=0.1,
        overlapping=overlapping,
    )
    shown = book.add(1, metrics | {'sample/decode_steps': steps}, **times)
    assert shown['tokens/s'] == 20
    steps.ready = True
    book.flush()
    assert rows[1] == shown | {
        'sample/decode_steps': 30, 'time/learn_s': learn_s,
        'time/sample_s': pytest.approx(sample_s),
    }


@pytest.fixture(scope='module')
def layouts():
  printed = many_devices.run(
      'import sys, split_step_test as test; '
      'test.on_eight_devices(*sys.argv[1:])',
      *LAYOUTS,
      optimized=False,
  )
  return {line.pop('name'): line for line in map(json.loads, printed)}


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('name', [x for x in LAYOUTS if 'fused' not in x])
def test_two_programs_take_the_steps_of_one(layouts, name):
  split, fused = layouts[name], layouts[REFERENCE.get(name, 'fused')]
  assert len(split['runs']) == len(fused['runs']) == NUM_STALENESS
  for staleness, (ours, theirs) in enumerate(zip(split['runs'], fused['runs'])):
    assert ours['tokens'] == theirs['tokens']
    assert theirs['tokens'][0] != theirs['tokens'][-1]
    assert max(abs(x['loss']) for x in theirs['metrics']) > 1e-3
    for mine, other in zip(ours['metrics'], theirs['metrics'], strict=True):
      assert mine.keys() == other.keys()
      for metric, value in other.items():
        np.testing.assert_allclose(
            mine[metric], value, rtol=1e-5, atol=1e-5, err_msg=metric
        )
    np.testing.assert_allclose(
        ours['parameters'], theirs['parameters'], rtol=1e-5
    )
    # Two updates a step; the first steps learn from what version 0 sampled.
    ages = [x['policy/age_max'] for x in ours['metrics']]
    assert ages == [2 * min(k, staleness) for k in range(3)]


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('name', [x for x in LAYOUTS if 'fused' not in x])
def test_each_program_compiles_once_and_has_its_devices(layouts, name):
  run = layouts[name]
  for program in ('learn_part', 'sample_part'):
    assert run['compiled'].count(program) == 1
  assert 'train_step' not in run['compiled']
  sampler = range(8)[-LAYOUTS[name].get('sampling__num_devices', 8):]
  expected = sampler if 'others' in name else range(4)
  assert run['sampled_on'] == list(expected)
  assert [x['devices'] for x in run['runs']] == [4] * NUM_STALENESS


@pytest.mark.several_devices
@pytest.mark.slow
def test_the_next_learning_is_started_while_the_sampler_works(tmp_path):
  printed = many_devices.run(
      'import sys, split_step_test as test; test.on_two_devices(sys.argv[1])',
      tmp_path,
      num_devices=2,
  )
  # One update a step: steps 2 and 3 started from what samplers waited for.
  assert json.loads(printed[-1]) == [0, 1, 2]
