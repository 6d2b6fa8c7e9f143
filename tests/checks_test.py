"""What cannot work is said before anything compiles: value and way out."""

import contextlib
import importlib
import pathlib

import jax
import pytest

from configs import default
from dppo_jax import advantages
from dppo_jax import algorithms
from dppo_jax import checks
from dppo_jax import main
from dppo_jax import normalizers
from dppo_jax import tasks
from dppo_jax import trust_regions

CONFIGS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py')
)


@contextlib.contextmanager
def nothing_compiles():
  """Fails if a model is so much as traced in here."""

  def refuse(*args, **kwargs):
    raise AssertionError('The model was traced.')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('dppo_jax.models.causal_lm.CausalLM.trunk', refuse)
    yield


def refused(match, algorithm='dppo_topk_tv', **changes):
  """The config with `changes` is refused with this message."""
  config = default.get_config(algorithm)
  config.update_from_flattened_dict(changes)
  with nothing_compiles():
    with pytest.raises(ValueError, match=match) as error:
      main.build(config)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', checks._POSITIVE)
def test_sizes_and_intervals_are_at_least_one(name):
  refused(rf'config\.{name}=0 must be at least 1', **{name: 0})


def test_programs_and_devices_go_together():
  refused("config.mode 'splitt'. Did you mean 'split'", mode='splitt')
  options = {'num_devices': 8, 'num_processes': 1}

  def refused_mode(match, mode='split', wanted=4, **changes):
    config = default.get_config()
    config.update_from_flattened_dict(
        {'mode': mode, 'sampling.num_devices': wanted}
    )
    with pytest.raises(ValueError, match=match) as error:
      checks.check_mode(config, **options | changes)
    assert '\n' not in str(error.value)

  for wanted in (8, -1):
    refused_mode(
        rf'num_devices={wanted} must be between 0 \(those that learn\) and 7',
        wanted=wanted,
    )
  refused_mode(
      "num_devices=4 needs two programs, and config.mode='fused' is one",
      mode='fused',
  )
  refused_mode('is for one process, and there are 2; use 0', num_processes=2)
  for mode, wanted in (('fused', 0), ('split', 0), ('split', 7)):
    config = default.get_config()
    config.mode, config.sampling.num_devices = mode, wanted
    checks.check_mode(config, **options)


def test_micro_batches_are_not_negative():
  refused(
      r'learner.num_microbatches=-1 must be 0 \(as few as fit the memory\) or',
      **{'learner.num_microbatches': -1},
  )


def choices(
    num_batch_shards=1,
    num_sampler_shards=0,
    algorithm='dppo_topk_tv',
    **changes,
):
  config = default.get_config(algorithm)
  config.update_from_flattened_dict({'learner.num_microbatches': 0} | changes)
  shards = {
      'num_batch_shards': num_batch_shards,
      'num_sampler_shards': num_sampler_shards,
  }
  checks.check(config, **shards)
  found = checks.microbatch_choices(config, num_batch_shards=num_batch_shards)
  for number in found:
    tried = checks.with_microbatches(config, number)
    assert tried.learner.num_microbatches == number
    checks.check(tried, **shards)
  assert config.learner.num_microbatches == 0
  return found


def test_micro_batches_to_choose_from_end_at_a_row_on_each_device():
  # 32 * 8 completions in 4 mini-batches: 64 rows.
  assert choices() == [1, 2, 4, 8, 16, 32, 64]
  assert choices(8) == [1, 2, 4, 8]
  assert choices(num_prompts=6, **{'learner.num_minibatches': 1}) == [
      1, 2, 3, 4, 6, 8, 12, 16, 24, 48
  ]
  assert choices(num_prompts=1, **{'learner.num_minibatches': 8}) == [1]
  # As many replayed as fresh.
  assert choices(**{'replay.capacity': 2})[-1] == 128


def test_micro_batches_to_choose_from_leave_the_sampler_its_own_devices():
  assert choices(8, 4, **{'sampling.num_slots': 4}) == [1, 2, 4, 8]
  assert choices(8, 2, **{'eval.num_slots': 2, 'sampling.num_halvings': 7}) == [
      1, 2, 4, 8
  ]


def test_micro_batches_of_packed_rows_to_choose_from_differ_in_size():
  # Two completions of 23 slots fit a row of 64: at most 32 rows, in parts of
  # 16 11 8 7 6 5 4 3 2 1 rows.
  packed = {'learner.row_length': 64}
  assert choices(**packed) == [2, 3, 4, 5, 6, 7, 8, 11, 16, 32]
  assert choices(8, **packed) == [2, 4]  # 16 or 8 rows.
  assert choices(num_prompts=1, **packed) == [2]


def test_dtypes_and_policies_of_memory_are_named():
  refused(r"config\.model\.params_dtype='int8' is not one of",
          **{'model.params_dtype': 'int8'})
  refused("config.model.remat 'dots_savable'. Did you mean 'dots_saveable'",
          **{'model.remat': 'dots_savable'})


@pytest.mark.parametrize('name, value', [
    ('model.router_replay', True), ('extras.router_balance', 0.01)
])
def test_what_needs_experts_is_refused_for_a_dense_model(name, value):
  refused(
      rf"config\.{name}={value} needs a mixture of experts, and 'embedded' is "
      'a dense model; use (False|0.0)',
      **{name: value},
  )


def test_sizes_that_do_not_divide_are_named_with_their_neighbours():
  refused(
      'num_prompts=5 times group_size=5 makes 25 completions, not divisible by '
      'learner.num_minibatches=4; for num_prompts, try 4 or 8',
      num_prompts=5, group_size=5,
  )
  refused(
      'num_prompts=8 times group_size=3 makes 24 completions.*'
      'num_minibatches=4 times num_microbatches=4, 16; for num_prompts, try 16',
      num_prompts=8, group_size=3, **{'learner.num_microbatches': 4},
  )


def test_fewer_completions_than_mini_batches_suggest_the_next_number():
  # 2 prompts of 2 completions are 4, one for each mini-batch.
  refused(
      'makes 2 completions.*for num_prompts, try 2', num_prompts=1, group_size=2
  )


@pytest.mark.parametrize('change, message', [
    ({'num_prompts': 12}, 'config.num_prompts=12 .* 8 devices .* try 8 or 16'),
    ({'sampling.num_slots': 100}, 'sampling.num_slots=100 .* try 96 or 104'),
    # 8 * 2 rows in 4 mini-batches: 4 rows on 8 devices.
    ({'num_prompts': 8, 'group_size': 2}, 'micro-batch=4 .* try 8'),
])
def test_sizes_that_the_devices_do_not_divide_are_named(change, message):
  config = default.get_config()
  config.update_from_flattened_dict(change)
  checks.check(config, num_batch_shards=1)
  with pytest.raises(ValueError, match=message):
    checks.check(config, num_batch_shards=8)


def test_prompts_divide_over_the_devices_that_sample():
  # Rows split by tokens: two rows of a micro-batch, eight of a rollout.
  config = default.get_config()
  config.num_prompts = 12
  checks.check(config, num_batch_shards=2)
  message = 'config.num_prompts=12 .* 8 devices .*sequence.* try 8 or 16'
  with pytest.raises(ValueError, match=message):
    checks.check(config, num_batch_shards=2, num_row_shards=8)


def test_slots_are_those_of_the_devices_that_sample():
  # Four devices learn and three sample: twelve prompts, and three slots.
  config = default.get_config()
  config.num_prompts = 12
  config.sampling.num_slots = 3
  shards = {'num_batch_shards': 4, 'num_sampler_shards': 3}
  checks.check(config, **shards)
  config.sampling.num_slots = 4
  message = 'num_slots=4 is not divisible by the 3 devices .*while sampling'
  with pytest.raises(ValueError, match=message):
    checks.check(config, **shards)
  config.num_prompts, config.sampling.num_slots = 16, 3
  message = 'num_prompts=16 is not divisible by the 3 .* try 15 or 18'
  with pytest.raises(ValueError, match=message):
    checks.check(config, **shards)


def test_stages_share_the_tokens_of_all_completions_at_once():
  for count in (-1, 21):
    refused(
        rf'num_stages={count} must be between 0 .* max_completion_length=20',
        **{'sampling.num_stages': count},
    )
  refused(
      r'config\.sampling\.num_stages=2 are of all completions at once.*'
      r'use num_stages=0, or num_slots=0 \(now 8\)',
      **{'sampling.num_stages': 2, 'sampling.num_slots': 8},
  )
  refused(
      r'or num_halvings=0 \(now 1\)',
      **{'sampling.num_stages': 2, 'sampling.num_halvings': 1},
  )


def test_slots_are_halved_on_each_device():
  refused('num_halvings=-1 must be 0', **{'sampling.num_halvings': -1})
  refused(
      'num_halvings=3 .* num_slots=12 cannot be; try 8 or 16, or fewer',
      **{'sampling.num_halvings': 3, 'sampling.num_slots': 12},
  )
  steps = {'sampling.num_halvings': 2, 'sampling.halving_steps': 3}
  refused(
      'num_halvings=2 with halving_steps=3 halves slots so many times, and '
      'num_slots=8 cannot be; try 12, or fewer',
      **steps, **{'sampling.num_slots': 8},
  )
  refused('halving_steps=0 must be 1', **{'sampling.halving_steps': 0})
  refused(
      r'config\.sampling\.halving_steps=2 are to each half, and '
      r'config\.sampling\.num_halvings=0 makes none; use num_halvings=1',
      **{'sampling.halving_steps': 2},
  )
  # All at once are 32 * 8.
  config = default.get_config()
  config.sampling.num_halvings = 5
  checks.check(config, num_batch_shards=8)
  config.sampling.num_halvings = 6
  message = r'num_prompts \* group_size=256 cannot be on each of 8.* try 512'
  with pytest.raises(ValueError, match=message):
    checks.check(config, num_batch_shards=8)


def test_packed_rows_hold_the_longest_completion_and_come_in_parts():
  many = {'learner.num_microbatches': 8}
  refused(
      'learner.row_length=22 has no room for max_prompt_length=4 and '
      'max_completion_length=20; use at least 23, or 0',
      **many, **{'learner.row_length': 22},
  )
  refused(
      'row_length=64 packs rows, but with learner.num_microbatches=1 all are '
      'computed.*for example 8, or row_length=0',
      **{'learner.row_length': 64},
  )
  # Parts of packed rows are as large as they need to be.
  config = default.get_config()
  config.learner.num_microbatches = 7
  config.learner.row_length = 23
  checks.check(config, num_batch_shards=8)


def test_only_packed_rows_are_halved_and_into_whole_slots():
  packed = {'learner.num_microbatches': 8, 'learner.row_length': 36}
  refused(
      r'config\.learner\.num_halvings=-1 must be 0 or more',
      **packed, **{'learner.num_halvings': -1},
  )
  refused(
      'learner.num_halvings=1 halves packed rows, and learner.row_length=0 '
      'packs none; set row_length, for example to 256, or use num_halvings=0',
      **{'learner.num_halvings': 1},
  )
  refused(
      'num_halvings=3 halves rows so many times, and learner.row_length=36 '
      'cannot be; use row_length=40, or fewer halvings',
      **packed, **{'learner.num_halvings': 3},
  )
  refused(
      'num_halvings=1 with halving_steps=5 halves rows so many times, and '
      'learner.row_length=36 cannot be; use row_length=40, or fewer halvings',
      **packed, **{'learner.num_halvings': 1, 'learner.halving_steps': 5},
  )
  # Tokens of a half are padded where the devices do not divide them.
  config = default.get_config()
  config.update_from_flattened_dict(packed | {'learner.num_halvings': 2})
  checks.check(config, num_batch_shards=2, num_row_shards=8)


def test_groups_that_share_a_prompt_stay_together_and_whole():
  shared = {'learner.share_prompts': True}
  refused(
      'share_prompts=True is for rows as sampled, and learner.row_length=64 '
      'packs them.*use row_length=0 or share_prompts=False',
      **shared, **{'learner.row_length': 64, 'learner.num_microbatches': 8},
  )
  refused('max_prompt_length=1 leaves nothing', max_prompt_length=1, **shared)
  # 32 groups, 4 mini-batches.
  refused(
      'keeps groups together, and 32 are not divisible into '
      'learner.num_minibatches=4 times num_microbatches=16 parts; try 64, or '
      'share_prompts=False',
      **shared, **{'learner.num_microbatches': 16},
  )
  config = default.get_config()
  config.learner.share_prompts = True
  config.learner.num_microbatches = 2
  checks.check(config, num_batch_shards=4)
  with pytest.raises(ValueError, match='parts, each on 8 devices; try 64'):
    checks.check(config, num_batch_shards=8)
  message = 'takes whole rows, and mesh.sequence=2 splits them; use sequence=1'
  with pytest.raises(ValueError, match=message):
    checks.check(config, num_batch_shards=2, num_row_shards=4)


def test_micro_batches_to_choose_from_hold_whole_groups_that_share():
  shared = {'learner.share_prompts': True}
  assert choices(**shared) == [1, 2, 4, 8]
  assert choices(4, **shared) == [1, 2]


@pytest.mark.parametrize('section, completions', [
    ('sampling', '256 completions of num_prompts=32 times group_size=8'),
    ('eval', '1024 completions of eval.num_prompts=128 times '
             'eval.num_samples=8'),
])
def test_slots_are_at_most_the_completions(section, completions):
  for count in (-1, 2000):
    refused(
        rf'{section}.num_slots={count} must be between 0 \(all\) and the '
        + completions,
        **{f'{section}.num_slots': count},
    )


def test_steps_to_trace_are_not_negative():
  refused('profile_steps=-1 must be 0', profile_steps=-1)


def test_a_mesh_that_does_not_fit_is_refused():
  count = jax.device_count()
  refused(f'does not fit {count} devices', **{'mesh.tensor': 7 * count})


@pytest.mark.parametrize('algorithm, vocabulary', [
    ('dppo_topk_tv', 454), ('dppo_topk_kl', 454)
])
def test_k_is_at_most_the_vocabulary(algorithm, vocabulary):
  k = {'divergence.k': vocabulary + 1}
  refused(
      f'config.divergence.k={vocabulary + 1} .* vocabulary of {vocabulary} '
      f'tokens; use at most {vocabulary}',
      algorithm, **k,
  )


def test_k_is_positive():
  refused('k=0 is not positive; the paper uses k=20', **{'divergence.k': 0})


@pytest.mark.parametrize('algorithm', [
    name for name in algorithms.names()
    # Where both signs have thresholds of their own, this one is not used.
    if algorithms.row(name).divergence['name'] != 'none'
    and 'threshold_low' not in algorithms.row(name).divergence
])
@pytest.mark.parametrize('threshold', [0.0, -0.2])
def test_a_threshold_is_positive(algorithm, threshold):
  refused(
      f'threshold={threshold} is not positive.*divergence none',
      algorithm, **{'divergence.threshold': threshold},
  )


@pytest.mark.parametrize('name', ['threshold_low', 'threshold_high'])
def test_a_threshold_of_one_sign_is_positive_too(name):
  refused(f'{name}=-1.0 is not positive', **{f'divergence.{name}': -1.0})


@pytest.mark.parametrize('name', [
    'divergence.threshold', 'extras.entropy_bonus', 'extras.kl_coefficient',
    'sampling.temperature',
])
def test_no_setting_is_nan(name):
  refused(fr'config\.{name}=nan is not a number', **{name: float('nan')})


def test_a_ratio_cap_is_positive():
  refused('ratio_cap=0.0 .* use inf for no cap', **{'loss.ratio_cap': 0.0})


@pytest.mark.parametrize('change, message', [
    ({'temperature': 0.0}, 'temperature=0.0 must be positive.*greedy'),
    ({'temperature': -1.0}, 'temperature=-1.0 must be positive'),
    ({'top_p': 0.9}, 'top_p=0.9 must be 1.0 in training.*eval.top_p is free'),
    ({'top_k': 20}, 'top_k=20 must be 0 in training.*eval.top_k is free'),
])
def test_training_samples_from_the_distribution_it_learns(change, message):
  refused(message, **{f'sampling.{k}': v for k, v in change.items()})


@pytest.mark.parametrize('change, message', [
    ({'temperature': -0.5}, 'eval.temperature=-0.5 must be 0 .greedy. or more'),
    ({'top_p': 0.0}, 'eval.top_p=0.0 must be above 0 and at most 1'),
    ({'top_p': 1.5}, 'eval.top_p=1.5'),
    ({'top_k': -1}, 'eval.top_k=-1 must be 0'),
    ({'top_k': 455}, 'eval.top_k=455 is larger than the vocabulary of 454'),
])
def test_evaluation_may_truncate_but_not_nonsense(change, message):
  refused(message, **{f'eval.{k}': v for k, v in change.items()})


@pytest.mark.parametrize('name', [
    'model.dtype', 'model.params_dtype', 'sampling.dtype',
    'sampling.weights_dtype', 'sampling.cache_dtype',
])
def test_a_dtype_is_one_of_the_known(name):
  refused(
      rf"config\.{name}='float8' is not one of .*bfloat16", **{name: 'float8'}
  )


def test_a_sequence_fits_the_models_positions():
  refused(
      'max_prompt_length=8 and max_completion_length=505 make 513 tokens, but '
      'the model has 512 positions',
      max_prompt_length=8, max_completion_length=505,
  )


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_a_seed_is_a_number_of_32_bits(seed):
  refused(f'config.seed={seed} must be between 0 and 4294967295', seed=seed)


def test_more_tokens_than_an_index_counts_are_refused():
  refused(
      '16384 completions of up to 131072 tokens, prompts included, are '
      '2147483648 tokens, and they are counted in 31 bits; lower num_prompts',
      num_prompts=2048, group_size=8, max_prompt_length=2,
      max_completion_length=131070,
  )


def test_a_prompt_that_is_longer_than_the_limit_is_named():
  config = default.get_config()
  config.max_prompt_length = 3
  with pytest.raises(ValueError, match='prompt .* has . tokens, more than '
                     'max_prompt_length=3; raise config.max_prompt_length'):
    main.build(config)


@pytest.mark.parametrize('section, kind', [
    ('divergence', 'divergence'), ('loss', 'loss'), ('advantage', 'advantage'),
    ('normalizer', 'normalizer'), ('optimizer', 'optimizer'), ('task', 'task'),
])
def test_an_unknown_name_is_refused_with_what_is_known(section, kind):
  config = default.get_config()
  wrong = config[section].name + 'x'
  config[section].name = wrong
  with pytest.raises(ValueError, match=f"Unknown {kind} '{wrong}'. Did you "
                     f"mean '{wrong[:-1]}'"):
    main.build(config)


@pytest.mark.parametrize('change, message', [
    ({'learning_rate': 0.0},
     'config.optimizer: learning_rate=0.0 is not positive'),
    ({'max_grad_norm': -1.0}, 'max_grad_norm=-1.0 .* use inf for none'),
    ({'schedule': 'cosin'}, "schedule 'cosin'. Did you mean 'cosine'"),
])
def test_an_impossible_optimizer_is_refused(change, message):
  refused(message, **{f'optimizer.{k}': v for k, v in change.items()})


@pytest.mark.parametrize('change, message', [
    ({'lora.rank': -1}, r'lora.rank=-1 must be 0 \(no adapters\)'),
    ({'lora.alpha': 0.0}, 'lora.alpha=0.0 must be positive'),
    ({'lora.targets': ('gates',)}, "targets 'gates'. Did you mean 'gate'"),
    ({'learning_rates': ('embed', 0.0)}, "has 'embed', not a pair.*commas"),
    ({'learning_rates': (('[', 0.0),)}, r"'\[' is no regular expression"),
    ({'learning_rates': (('embed', -1.0),)}, "factor -1.0 of 'embed'"),
    ({'learning_rates': (('embed', '0'),)}, "factor '0' of 'embed'"),
    ({'learning_rates': (('layrs', 0.0),)}, "learning_rates: .*'layrs'"),
    ({'lora.rank': 161}, r'rank=161 .* inputs \(160\)'),
    ({'stop': ('no token is this',)}, "config.stop 'no token is this'"),
])
def test_what_cannot_be_trained_or_ended_is_refused(change, message):
  refused(message, **change)


@pytest.mark.parametrize('change, message', [
    ({'staleness': -1}, r'config.staleness=-1 must be 0 \(learn at once\)'),
    ({'replay.capacity': -2}, r'replay.capacity=-2 must be 0 \(no buffer\)'),
    # .3 * 32 prompts.
    (
        {'replay.capacity': 2, 'replay.ratio': 0.3},
        'replay.ratio=0.3 times num_prompts=32 makes 9.6 groups; it must be a '
        'whole number',
    ),
    (
        {'replay.capacity': 2, 'replay.ratio': 0.0},
        'ratio=0.0 times num_prompts=32 makes 0 groups; .* at least 1',
    ),
    (
        {'replay.capacity': 2, 'replay.ratio': 3.0},
        'ratio=3.0 asks for more rollouts than capacity=2 keeps; raise',
    ),
    (
        {'replay.capacity': 1, 'replay.sampling': 'ess'},
        "sampling='ess' draws twice as many .* capacity=1 must be at least "
        'twice the ratio 1.0',
    ),
    # 2 groups of 8 in 32 parts.
    (
        {
            'replay.capacity': 1, 'replay.sampling': 'ess',
            'replay.ratio': 1 / 32, 'learner.num_microbatches': 8,
        },
        "sampling='ess' looks at 2 groups of group_size=8 in 32 parts of equal "
        'size; change',
    ),
    ({'replay.capacity': 2, 'replay.sampling': 'resent'},
     "replay sampling 'resent'. Did you mean 'recent'"),
    # Four updates a step: 4 old at the next step's start, 7 at its end.
    (
        {'replay.capacity': 2, 'replay.max_age': 6},
        'max_age=6 lets nothing be replayed: with 4 updates a step and '
        'staleness=0, the youngest .* reaches an age of 7',
    ),
    (
        {'replay.capacity': 2, 'replay.max_age': 14, 'staleness': 2},
        'max_age=14 .* staleness=2, .* reaches an age of 15',
    ),
    # 1 replayed group and 32 of 8: 264 rows.
    (
        {
            'replay.capacity': 1, 'replay.ratio': 1 / 32,
            'learner.num_minibatches': 16,
        },
        'num_prompts=32 and 1 replayed times group_size=8 makes 264 '
        'completions, not divisible by learner.num_minibatches=16; for all '
        'groups together, try 32 or 34',
    ),
    (
        {'replay.capacity': 1, 'num_groups': 65},
        r'num_groups=65 must be between 0 \(all\) and num_prompts=32 plus 32 '
        'replayed',
    ),
], ids=lambda x: '-'.join(x) if isinstance(x, dict) else '')
def test_old_data_that_cannot_be_learned_from_are_refused(change, message):
  refused(message, **change)


def test_groups_to_choose_from_divide_over_devices():
  config = default.get_config()
  config.update_from_flattened_dict({
      'replay.capacity': 1, 'replay.sampling': 'ess', 'replay.ratio': 1 / 32,
      'replay.max_age': 15, 'learner.num_minibatches': 8, 'num_groups': 32,
  })
  checks.check(config, num_batch_shards=2)
  with pytest.raises(ValueError, match='2 groups .* 8 parts .* on 4 devices'):
    checks.check(config, num_batch_shards=4)


def test_the_oldest_data_that_can_be_learned_from_are_accepted():
  config = default.get_config()
  config.replay.capacity = 2
  for staleness, max_age in ((0, 7), (2, 15)):
    config.staleness, config.replay.max_age = staleness, max_age
    checks.check(config, num_batch_shards=1)
  config.num_groups = 64  # All fresh and all replayed groups.
  checks.check(config, num_batch_shards=1)


@pytest.mark.parametrize('algorithm, change, message', [
    ('r2vpo', {'dual': 'none'}, "loss.name='r2vpo' and config.dual.name='none' "
     'do not go together: r2vpo needs a dual, for example projected_ascent.'),
    ('grpo', {'dual': 'fixed'}, "loss.name='policy_gradient' and "
     "config.dual.name='fixed' do not go together: a dual is the price of a "
     'constraint, and policy_gradient has none.'),
])
def test_a_constraint_and_its_price_go_together(algorithm, change, message):
  config = default.get_config(algorithm)
  config.dual.name = change['dual']
  with nothing_compiles(), pytest.raises(ValueError, match=message):
    main.build(config)


@pytest.mark.parametrize('ratio, normalizer, fitting', [
    ('geometric', 'constant', 'sequence_mean'),
    ('geometric', 'token_mean', 'sequence_mean'),
    ('token', 'sequence_mean', 'constant or sequence_sum or token_mean'),
    ('sequence', 'sequence_mean', 'constant or sequence_sum or token_mean'),
    ('token', 'prompt_mean', 'constant or sequence_sum or token_mean'),
])
def test_a_constraint_is_lowered_by_the_weights_it_is_measured_by(
    ratio, normalizer, fitting
):
  config = default.get_config('r2vpo')
  config.loss.ratio = ratio
  config.normalizer = normalizers.config(normalizer)
  with nothing_compiles(), pytest.raises(
      ValueError, match=f"normalizer.name='{normalizer}' and config.loss.ratio="
      f"'{ratio}' of r2vpo do not go together.* Use normalizer.name={fitting}."
  ):
    main.build(config)
  for name in fitting.split(' or '):
    config.normalizer = normalizers.config(name)
    checks.check(config, num_batch_shards=1)


@pytest.mark.parametrize('algorithm, change, message', [
    ('cispo', {'trust_region': 'sequence_ratio'}, "'sequence_ratio' drops what "
     "is beyond a threshold, and config.divergence.name='none' has none"),
    ('pg_is', {'trust_region': 'cumulative_prefix'}, 'would drop nothing'),
])
def test_a_rule_that_needs_a_threshold_has_one(algorithm, change, message):
  config = default.get_config(algorithm)
  config.trust_region = trust_regions.config(change['trust_region'])
  with nothing_compiles(), pytest.raises(ValueError, match=message):
    main.build(config)


@pytest.mark.parametrize('change, message', [
    ({'extras.kl_coefficient': -0.1}, 'kl_coefficient=-0.1 must be 0'),
    ({'extras.kl_coefficient': 0.1, 'extras.kl_estimator': 'k1'},
     "kl_estimator='k1' in the loss holds nothing back.* Use k2, k3 or full"),
])
def test_a_penalty_that_holds_nothing_back_is_refused(change, message):
  refused(message, **change)


@pytest.mark.parametrize('change, message', [
    ({'kl_estimator': 'k4'}, "config.extras: Unknown estimator 'k4'"),
    ({'kl_where': 'los'}, "config.extras: Unknown place 'los'. Did you mean"),
    ({'kl_estimator': 'full', 'kl_where': 'reward'},
     "config.extras: kl_estimator='full' .* use kl_where='loss', or k1"),
])
def test_an_impossible_extra_term_is_named_with_its_section(change, message):
  refused(message, **{f'extras.{k}': v for k, v in change.items()})


@pytest.mark.parametrize('advantage, change, message', [
    ('raw', {'drop_groups_without_spread': True}, 'use another advantage, or '
     'drop_groups_without_spread=False'),
    ('raw', {'num_groups': 8}, 'or num_groups=0'),
    ('raw', {'replay.capacity': 2}, 'or replay.capacity=0'),
    ('batch_zscore', {'replay.capacity': 2}, 'leaves rows empty while it '
     'fills.*use group_zscore, or replay.capacity=0'),
    ('batch_zscore', {'drop_groups_without_spread': True}, 'would count them '
     'in the deviation.*or drop_groups_without_spread=False'),
])
def test_advantages_that_do_not_go_with_the_choice_of_groups_are_refused(
    advantage, change, message
):
  config = default.get_config()
  config.advantage = advantages.config(advantage)
  config.update_from_flattened_dict(change)
  with nothing_compiles(), pytest.raises(ValueError, match=message):
    main.build(config)


@pytest.mark.parametrize('number', [0, 2])
def test_a_variance_around_the_mean_needs_a_whole_mini_batch(number):
  refused(
      "loss.center='mean' needs a whole mini-batch at once; use learner."
      f'num_microbatches=1 or center=one, not num_microbatches={number}',
      'r2vpo', **{'loss.center': 'mean', 'learner.num_microbatches': number},
  )


def test_an_unknown_algorithm_is_refused_with_the_nearest():
  with pytest.raises(ValueError, match="algorithm 'dppo_topk_tvv'. Did you "
                     "mean 'dppo_topk_tv'.*Known: .*grpo_clip_higher"):
    default.get_config('dppo_topk_tvv')


def test_an_unknown_field_is_refused_with_the_nearest():
  config = default.get_config()
  with pytest.raises(AttributeError, match='Did you mean "total_steps"'):
    config.total_step = 3
  with pytest.raises(AttributeError, match='Did you mean "threshold"'):
    config.divergence.treshold = 0.1


def test_a_verifier_that_may_hang_needs_workers():
  config = default.get_config()
  checks.check_verifier(config, may_hang=False)
  with pytest.raises(ValueError, match="workers=0, .*'arithmetic' may hang"):
    checks.check_verifier(config, may_hang=True)
  config.scoring.num_workers = 1
  checks.check_verifier(config, may_hang=True)


@pytest.mark.parametrize('preset', tasks.math.presets())
def test_every_preset_of_math_is_a_config_that_passes(preset):
  config = importlib.import_module('configs.math').get_config(preset)
  checks.check(config, num_batch_shards=1)
  checks.check_verifier(config, may_hang=True)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_is_locked_says_how_to_run_it_and_passes(name):
  module = importlib.import_module(f'configs.{name}')
  config = module.get_config()
  assert config.is_locked
  checks.check(config, num_batch_shards=1)
  if config.model.name == 'embedded':
    checks.check_model(config, vocab_size=454, max_positions=512)
  documentation = (module.__doc__ or '') + (module.get_config.__doc__ or '')
  assert f'configs/{name}.py' in documentation


@pytest.mark.parametrize('name', algorithms.names())
def test_every_algorithm_is_a_config_that_passes(name):
  config = default.get_config(name)
  assert config.algorithm == name
  checks.check(config, num_batch_shards=1)


def test_layers_one_by_one_with_experts_compute_them_again():
  config = default.get_config()
  config.model.unroll_layers = True
  sizes = {'vocab_size': 454, 'max_positions': 512}
  checks.check_model(config, **sizes)
  with pytest.raises(ValueError, match="unroll_layers=True would .*'full'"):
    checks.check_model(config, num_experts=4, **sizes)
  config.model.remat = 'full'
  checks.check_model(config, num_experts=4, **sizes)
