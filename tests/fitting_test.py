"""A step that does not fit is refused before it runs, or made to fit."""

import re
import types

import jax
import pytest
import tiny_model

from configs import default
from dppo_jax import fitting
from dppo_jax import main
from dppo_jax import memory
from dppo_jax import training
from dppo_jax.types import TrainState


def config_with(**changes):
  config = default.get_config()
  config.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in changes.items()}
  )
  return config


def sizes_of(arguments, temporary):
  return {
      'arguments': arguments, 'temporary': temporary, 'results': 1 * 10**6,
      'total': arguments + temporary + 1 * 10**6,
  }


def refused(config, sizes, limit, num_batch_shards=1):
  """The message of the error."""
  with pytest.raises(ValueError) as error:
    fitting.check(
        config, sizes, limit=limit, num_batch_shards=num_batch_shards
    )
  assert '\n' not in str(error.value)
  return str(error.value)


# What is said.


def test_what_is_needed_what_there_is_and_the_way_out_are_named():
  message = refused(config_with(), sizes_of(2 * 10**9, 10**10), 8 * 10**9)
  assert message == (
      'The training step needs 12.00 GB on each device, which has 8.00 GB. '
      'Most of it is temporary, 10.00 GB (arguments 2.00 GB, results 1.00 MB). '
      'To lower it: raise config.learner.num_microbatches (now 1, and 0 finds '
      'how many fit); set learner.chunk_size (now 0, all logits at once); '
      "model.remat='full' (now 'none'); sampling.num_slots (now 0, all "
      "completions at once); model.dtype='bfloat16' (now 'float32'); "
      "sampling.dtype='bfloat16' (now 'float32')."
  )


def test_a_row_a_device_that_is_too_long_may_be_split():
  config = config_with(learner__num_microbatches=16)  # 4 rows, a device each.
  message = refused(
      config, sizes_of(1, 10**9), 10**6, num_batch_shards=4
  )
  assert 'config.mesh.sequence (now 1)' in message
  assert 'num_microbatches' not in message


def test_a_sampler_on_fewer_devices_than_learn_has_ways_out_too():
  config = config_with(sampling__num_slots=4)  # One on each of 4 devices.
  message = refused(config, sizes_of(1, 10**9), 10**6, num_batch_shards=8)
  assert 'raise config.learner.num_microbatches (now 1' in message


FRUGAL = {
    'learner__num_microbatches': 64,  # A row in each.
    'learner__chunk_size': 8,
    'model__remat': 'full',
    'model__dtype': 'bfloat16',
    'sampling__dtype': 'bfloat16',
    'sampling__num_slots': 4,
}


@pytest.mark.parametrize('name', FRUGAL)
def test_only_what_is_not_yet_set_is_proposed(name):
  others = {k: x for k, x in FRUGAL.items() if k != name}
  message = refused(config_with(**others), sizes_of(1, 10**9), 10**6)
  *_, ways = message.partition('To lower it: ')
  assert name.replace('__', '.') in ways
  assert ';' not in ways


def test_without_any_setting_left_there_are_devices_and_sizes():
  config = config_with(**FRUGAL, lora__rank=4, model__params_dtype='bfloat16')
  message = refused(config, sizes_of(1, 10**9), 10**6)
  assert 'use more or larger devices, or lower config.num_prompts' in message


def test_what_lasts_is_lowered_by_other_settings():
  large = sizes_of(10**10, 10**9)
  message = refused(
      config_with(replay__capacity=2, mesh__data=4, mesh__fsdp=2), large,
      9 * 10**9, num_batch_shards=8,
  )
  assert message.endswith(
      'To lower it: config.mesh.fsdp=8 and mesh.data=1 (now 2 and 4 copies); '
      'config.lora.rank (now 0, everything is trained); '
      "optimizer.mu_dtype='bfloat16' (now 'float32'); lower replay.capacity "
      '(now 2).'
  )
  assert 'num_microbatches' not in message  # Not even without any.
  # The arguments have room by themselves.
  assert 'num_microbatches' in refused(config_with(), large, 10**10 + 1)
  message = refused(config_with(lora__rank=4, mesh__fsdp=-1, mesh__data=1),
                    large, 10**9, num_batch_shards=8)
  assert 'mesh' not in message and 'mu_dtype' not in message
  assert "config.model.params_dtype='bfloat16' (now 'float32')" in message


def test_what_lasts_is_refused_by_its_largest_kind():
  kinds = {'parameters': 4 * 10**9, 'optimizer state': 8 * 10**9}
  options = {'num_batch_shards': 1}
  with pytest.raises(
      ValueError, match='step to step takes 12.00 GB on each device, which has '
      '10.00 GB. Most of it is optimizer state, 8.00 GB. To lower it: config.lo'
  ):
    fitting.check_lasting(config_with(), kinds, limit=10**10, **options)
  for limit in (12 * 10**9, None):
    fitting.check_lasting(config_with(), kinds, limit=limit, **options)


def test_a_step_that_fits_or_that_nobody_knows_of_is_not_refused():
  sizes = sizes_of(1, 2)
  for told, limit in ((sizes, sizes['total']), (sizes, None), ({}, 1)):
    fitting.check(config_with(), told, limit=limit, num_batch_shards=1)


# Number of micro-batches.


class Programs:
  """Stands in for what XLA makes of k micro-batches.

  Attributes:
    compiled: k of each, in order.
  """

  def __init__(self, temporary, *, arguments=10, state=()):
    self.compiled = []
    self._temporary = temporary
    self._arguments = arguments
    self._state = state

  def make(self, config):
    empty = dict.fromkeys(TrainState._fields, ())
    state = TrainState(**empty | {'params': self._state})
    return types.SimpleNamespace(
        number=config.learner.num_microbatches, state=state
    )

  def lower(self, program):
    def compile_it():
      self.compiled.append(program.number)
      temporary = self._temporary(program.number)
      return types.SimpleNamespace(
          memory_analysis=lambda: types.SimpleNamespace(
              argument_size_in_bytes=self._arguments,
              temp_size_in_bytes=temporary,
              output_size_in_bytes=0,
              alias_size_in_bytes=0,
          )
      )

    return types.SimpleNamespace(compile=compile_it)

  def fit(self, limit, *, number=0, to_train=True):
    program, _ = fitting.make_program(
        config_with(learner__num_microbatches=number), self.make, self.lower,
        limit=limit, num_batch_shards=1, to_train=to_train,
    )
    assert program.number == (self.compiled or [program.number])[-1]
    return program.number


@pytest.mark.parametrize('limit, compiled', [
    (1110, [1]),
    # 1000 / 600 of the memory: at least 2, of 1, 2, 4, 8, 16, 32, 64.
    (700, [1, 2]),
    # 100 + 1000 / k within 390, 290, 140 and 120 after the arguments.
    (400, [1, 4]),
    (300, [1, 4, 8]),
    (150, [1, 8, 32]),
    (130, [1, 16, 64]),
])
def test_the_fewest_micro_batches_that_fit_are_found_in_few_trials(
    limit, compiled
):
  programs = Programs(lambda k: 100 + 1000 // k)
  assert programs.fit(limit) == compiled[-1]
  assert programs.compiled == compiled


def test_what_no_micro_batch_makes_fit_is_refused_with_the_last_trial():
  programs = Programs(lambda k: 100 + 1000 // k)
  with pytest.raises(ValueError, match='needs 0.00 MB .* learner.chunk_size'):
    programs.fit(110)
  assert programs.compiled == [1, 16, 64]
  # Where it does not get less, only a few are tried.
  programs = Programs(lambda k: 1000)
  with pytest.raises(ValueError, match='Most of it is temporary') as error:
    programs.fit(600)
  assert programs.compiled == [1, 2, 8, 32, 64]
  assert 'num_microbatches' not in str(error.value)


def test_memory_that_first_stays_as_it_is_may_still_get_less():
  # Sampling needs 500 whatever the parts.
  programs = Programs(lambda k: max(500, 8000 // k - 3000))
  assert programs.fit(600) < 64


def test_arguments_that_do_not_fit_are_not_tried_in_parts():
  programs = Programs(lambda k: 1000 // k, arguments=500)
  with pytest.raises(ValueError, match='To lower it: config.lora.rank'):
    programs.fit(400)
  assert programs.compiled == [1]


def test_a_number_that_is_given_is_compiled_alone():
  programs = Programs(lambda k: 1000 // k)
  assert programs.fit(400, number=4) == 4
  with pytest.raises(ValueError, match=r'num_microbatches \(now 2, and 0 find'):
    programs.fit(400, number=2)
  assert programs.compiled == [4, 2]


def test_where_memory_is_unknown_one_micro_batch_fits():
  assert Programs(lambda k: 1000).fit(None) == 1


def test_without_a_step_to_take_nothing_is_compiled():
  programs = Programs(lambda k: 10**12)
  assert programs.fit(1000, to_train=False) == 1
  assert not programs.compiled


def test_what_lasts_is_refused_before_anything_is_compiled():
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = jax.ShapeDtypeStruct((1000,), 'float32', sharding=where)
  programs = Programs(lambda k: 1, state=state)
  with pytest.raises(ValueError, match='What lasts .* is parameters'):
    programs.fit(3999)
  assert not programs.compiled
  programs.fit(4000)


def out_of_memory(k, largest=2):
  """As of XLA for a TPU."""
  if k > largest:
    return 1000 // k
  raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of '
      '16G hbm.\n\nTotal hbm usage >= 20G:\n  program 19G\n'
  )


def test_a_compiler_that_runs_out_of_memory_is_one_line():
  with pytest.raises(ValueError, match='finds no room for the training step: '
                     'RESOURCE_EXHAUSTED: .* 16G hbm. To lower .* raise') as e:
    Programs(out_of_memory).fit(None, number=1)
  assert '\n' not in str(e.value)
  programs = Programs(out_of_memory)
  assert programs.fit(1000) == 4
  assert programs.compiled == [1, 2, 4]
  programs = Programs(lambda k: out_of_memory(k, largest=64))
  with pytest.raises(ValueError, match='finds no room'):
    programs.fit(1000)
  assert programs.compiled == [1, 2, 4, 8, 16, 32, 64]


def test_other_errors_of_the_compiler_are_left_alone():
  def broken(k):
    raise jax.errors.JaxRuntimeError('INTERNAL: a bug')

  with pytest.raises(jax.errors.JaxRuntimeError, match='a bug'):
    Programs(broken).fit(1000)


# Held-out evaluation.


def evaluation_refused(limit, held=0, shared=0, **changes):
  lowered = jax.jit(lambda x: jax.numpy.outer(x, x)).lower(
      jax.ShapeDtypeStruct((1000,), 'float32')
  )  # 4 kB become 4 MB.
  fitting.check_beside(
      lowered, config_with(**changes), limit=limit, held=held, shared=shared
  )


def test_an_evaluation_that_does_not_fit_beside_a_run_has_ways_out():
  evaluation_refused(4_004_000)
  evaluation_refused(None, held=10**12)
  evaluation_refused(6_000_000, held=2_000_000, shared=4_000)
  with pytest.raises(ValueError) as error:
    evaluation_refused(6_000_000, held=2_000_000)
  assert str(error.value) == (
      'Held-out evaluation needs 4.00 MB on each device beside the 2.00 MB of '
      'a run, and there are 6.00 MB. To lower it: set config.eval.num_slots '
      '(now 0, all 1024 completions at once); eval.num_prompts (now 128); '
      "eval.num_samples (now 8); config.sampling.dtype='bfloat16' (now "
      "'float32')."
  )
  with pytest.raises(ValueError, match='lower config.eval.num_slots .now 64'):
    evaluation_refused(
        10**6, eval__num_slots=64, sampling__dtype='bfloat16'
    )


# Of a run.

SMALL = {
    'num_prompts': 4, 'group_size': 4, 'max_completion_length': 8,
    'eval__num_prompts': 4, 'eval__num_samples': 1,
    'learner__num_minibatches': 1, 'divergence__k': 4,
    'compilation_cache': '',
}


@pytest.mark.slow
@pytest.mark.parametrize('row_length', [0, 24])
def test_a_run_compiles_its_step_once_for_each_trial(
    monkeypatch, caplog, row_length
):
  config = config_with(
      **SMALL, learner__num_microbatches=0, learner__row_length=row_length
  )
  told = []

  def of_step(compiled, real=memory.of_step):
    told.append(real(compiled))
    return told[-1]

  monkeypatch.setattr(memory, 'of_step', of_step)
  # Between the step in one part, or two, and that in many.
  limit = 31_000_000
  monkeypatch.setattr(memory, 'limit', lambda: limit)
  with tiny_model.quick_compilation(), jax.log_compiles():
    parts = main.build(config)
    training.warm_up(
        parts, parts.state, training.blank_rollout(parts), next(parts.prompts)
    )
  *trials, _, run = told  # The evaluation is in between.
  totals = [sizes['total'] for sizes in trials]
  assert len(totals) > 1
  assert totals[-2] > limit >= totals[-1]
  assert run == trials[-1]
  compiled = [
      x for x in caplog.messages
      if re.search(r'Finished XLA compilation of jit\(train_step\)', x)
  ]
  assert len(compiled) == len(trials)
  assert parts.train_step._cache_size() == 1
  assert config.learner.num_microbatches == 0
