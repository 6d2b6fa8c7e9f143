"""Says what is wrong with a config before anything compiles.

Every message names the field, its value and the way out. Names and options of
divergences, losses and so on are checked by building them, which is cheap.
"""

import math
import re
from typing import Any

import jax

from dppo_jax import advantages
from dppo_jax import halvings
from dppo_jax import lora
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax import registry
from dppo_jax import trust_regions
from dppo_jax.models import attention_kernels
from dppo_jax.models import quantization
from dppo_jax.models.causal_lm import REMAT

_POSITIVE = (
    'total_steps',
    'num_prompts',
    'group_size',
    'max_prompt_length',
    'max_completion_length',
    'learner.num_epochs',
    'learner.num_minibatches',
    'max_nonfinite_updates',
    'eval.every',
    'eval.num_prompts',
    'eval.num_samples',
    'checkpoint_every',
    'keep_checkpoints',
)
# What may be 0, and what that means.
_MEANING_OF_ZERO = {
    'profile_steps': 'none',
    'learner.num_microbatches': 'as few as fit the memory',
    'learner.chunk_size': 'all at once',
    'lora.rank': 'no adapters',
    'eval.temperature': 'greedy',
    'eval.top_k': 'no limit',
    'extras.kl_coefficient': 'no penalty',
    'staleness': 'learn at once',
    'replay.capacity': 'no buffer',
}
_MODES = ('fused', 'split')
_DTYPES = ('float32', 'bfloat16')
# The learner's gradients would need a loss scale for float16.
_SAMPLER_DTYPES = (*_DTYPES, 'float16')
_KEPT_DTYPES = ('', *_SAMPLER_DTYPES, *quantization.SCALED)


def check(
    config: Any,
    *,
    num_batch_shards: int,
    num_row_shards: int = 0,
    num_sampler_shards: int = 0,
) -> None:
  """Raises a ValueError for the first thing that cannot work.

  Args:
    config: of a run.
    num_batch_shards: devices over which a micro-batch is split.
    num_row_shards: devices over which whole rows are split; as many if 0.
    num_sampler_shards: devices over which they are while sampling; as many as
      whole rows if 0.
  """
  for name in _POSITIVE:
    value = _get(config, name)
    if value < 1:
      raise ValueError(f'config.{name}={value} must be at least 1.')
  if not 0 <= config.seed < 2**32:
    raise ValueError(
        f'config.seed={config.seed} must be between 0 and {2**32 - 1}.'
    )
  _check_numbers(config)
  for name, meaning in _MEANING_OF_ZERO.items():
    value = _get(config, name)
    if value < 0:
      raise ValueError(
          f'config.{name}={value} must be 0 ({meaning}) or more.'
      )
  for name, known in (
      ('model.dtype', _DTYPES),
      ('model.params_dtype', _DTYPES),
      ('sampling.dtype', _SAMPLER_DTYPES),
      ('sampling.weights_dtype', _KEPT_DTYPES),
      ('sampling.cache_dtype', _KEPT_DTYPES),
  ):
    if _get(config, name) not in known:
      raise ValueError(
          f'config.{name}={_get(config, name)!r} is not one of {known}.'
      )
  _check_lora(config.lora)
  _check_rules(config.learning_rates)
  for name, known in (
      ('model.remat', REMAT),
      ('model.attention', attention_kernels.NAMES),
      ('sampling.attention', attention_kernels.DECODE_NAMES),
  ):
    if _get(config, name) not in known:
      raise ValueError(
          registry.unknown(f'config.{name}', _get(config, name), known)
      )
  _check_sampling(config.sampling)
  _check_eval_sampling(config.eval)
  if config.learner.reuse_forward:
    _check_reuse(config)
  row_shards = num_row_shards or num_batch_shards
  _check_parts(config, num_batch_shards, row_shards)
  _check_slots(
      'sampling', config.sampling.num_slots, config, 'num_prompts', 'group_size'
  )
  _check_slots(
      'eval', config.eval.num_slots, config, 'eval.num_prompts',
      'eval.num_samples',
  )
  _check_stages(config)
  _check_shards(config, row_shards, num_sampler_shards or row_shards)
  _check_micro_batch(config, num_batch_shards)


def check_mode(config: Any, *, num_devices: int, num_processes: int) -> None:
  """Raises a ValueError if programs and devices do not go together.

  Args:
    config: of a run.
    num_devices: of all processes.
    num_processes: that share them.
  """
  if config.mode not in _MODES:
    raise ValueError(registry.unknown('config.mode', config.mode, _MODES))
  if config.learner.reuse_forward and config.mode != 'fused':
    raise ValueError(
        'config.learner.reuse_forward=True is for a sampler in the program of '
        f'the learner, and config.mode={config.mode!r} has two; use '
        "mode='fused', or reuse_forward=False."
    )
  if config.learner.reuse_forward and num_devices > 1:
    raise ValueError(
        'config.learner.reuse_forward=True is for one device, and there are '
        f'{num_devices}; use reuse_forward=False, or show JAX one of them (as '
        'by CUDA_VISIBLE_DEVICES=0, or by TPU_VISIBLE_CHIPS=0).'
    )
  wanted = config.sampling.num_devices
  if not 0 <= wanted < num_devices:
    raise ValueError(
        f'config.sampling.num_devices={wanted} must be between 0 (those that '
        f'learn) and {num_devices - 1}: one of the {num_devices} devices must '
        'be left to learn.'
    )
  if not wanted:
    return
  if config.mode != 'split':
    raise ValueError(
        f'config.sampling.num_devices={wanted} needs two programs, and '
        f"config.mode={config.mode!r} is one; use config.mode='split', or 0."
    )
  # jax.device_put takes nothing from one process's devices to another's.
  if num_processes > 1:
    raise ValueError(
        f'config.sampling.num_devices={wanted} is for one process, and there '
        f'are {num_processes}; use 0, all devices learn and sample.'
    )


def check_verifier(config: Any, *, may_hang: bool) -> None:
  """Raises a ValueError if nothing would end a verification that hangs."""
  if may_hang and not config.scoring.num_workers:
    raise ValueError(
        f'config.scoring.num_workers=0, but the verifier of task '
        f'{config.task.name!r} may hang on what a policy writes; set '
        'config.scoring.num_workers, for example to 4.'
    )


def check_model(
    config: Any, *, vocab_size: int, max_positions: int, num_experts: int = 0
) -> None:
  """Raises a ValueError for what the model cannot do, from its sizes."""
  for section, name, off in (
      ('model', 'router_replay', False), ('extras', 'router_balance', 0.0)
  ):
    if config[section][name] and not num_experts:
      raise ValueError(
          f'config.{section}.{name}={config[section][name]} needs a mixture of '
          f'experts, and {config.model.name!r} is a dense model; use {off}.'
      )
  if (
      config.learner.reuse_forward and num_experts
      and not config.model.router_replay
  ):
    raise ValueError(
        'config.learner.reuse_forward=True needs the experts that sampled, and '
        f'{config.model.name!r} is a mixture of experts; use '
        'model.router_replay=True, or reuse_forward=False.'
    )
  keeps_all = config.model.unroll_layers and config.model.remat == 'none'
  if keeps_all and num_experts:
    raise ValueError(
        'config.model.unroll_layers=True would keep what is gathered of the '
        'experts of all layers; use model.remat=\'full\', or '
        'unroll_layers=False.'
    )
  if 'k' in config.divergence and config.divergence.k > vocab_size:
    raise ValueError(
        f'config.divergence.k={config.divergence.k} is larger than the '
        f'vocabulary of {vocab_size} tokens; use at most {vocab_size}.'
    )
  length = config.max_prompt_length + config.max_completion_length
  if length > max_positions:
    raise ValueError(
        f'config.max_prompt_length={config.max_prompt_length} and '
        f'max_completion_length={config.max_completion_length} make {length} '
        f'tokens, but the model has {max_positions} positions; make them '
        f'{max_positions} together at most.'
    )
  for section in ('sampling', 'eval'):
    if config[section].top_k > vocab_size:
      raise ValueError(
          f'config.{section}.top_k={config[section].top_k} is larger than the '
          f'vocabulary of {vocab_size} tokens; use 0 for no limit.'
      )


def _check_numbers(config):
  for path, value in jax.tree.leaves_with_path(config.to_dict()):
    if isinstance(value, float) and math.isnan(value):
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      raise ValueError(f'config.{name}={value} is not a number.')


def _get(config, name):
  for part in name.split('.'):
    config = config[part]
  return config


def _check_lora(settings):
  if not settings.alpha > 0:
    raise ValueError(f'config.lora.alpha={settings.alpha} must be positive.')
  for target in settings.targets:
    if target not in lora.TARGETS:
      raise ValueError(
          registry.unknown('config.lora.targets', target, lora.TARGETS)
      )


def _check_rules(rules):
  """Pairs of a pattern and a factor; what they match needs the model."""
  for rule in rules:
    if not isinstance(rule, (tuple, list)) or len(rule) != 2:
      raise ValueError(
          f'config.learning_rates has {rule!r}, not a pair of a regular '
          "expression and a factor; write (('embed', 0.0),), commas included."
      )
    pattern, factor = rule
    try:
      re.compile(pattern)
    except (re.error, TypeError) as error:
      raise ValueError(
          f'config.learning_rates: {pattern!r} is no regular expression '
          f'({error}).'
      ) from error
    if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
      raise ValueError(
          f'config.learning_rates: factor {factor!r} of {pattern!r} must be '
          'a number, 0 (frozen) or more.'
      )


def _check_sampling(sampling):
  """The learner must be able to name the probability of what was sampled."""
  if not sampling.temperature > 0:
    raise ValueError(
        f'config.sampling.temperature={sampling.temperature} must be positive: '
        'a greedy policy gives its token probability 1 whatever the weights, '
        'so there is no log-prob to learn from.'
    )
  for name, neutral in (('top_p', 1.0), ('top_k', 0)):
    if sampling[name] != neutral:
      raise ValueError(
          f'config.sampling.{name}={sampling[name]} must be {neutral} in '
          'training: truncation renormalises over a set that changes with the '
          'policy, so the importance ratio would be biased by its mass. Use '
          f'temperature to sharpen; config.eval.{name} is free.'
      )


def _check_eval_sampling(settings):
  if not 0 < settings.top_p <= 1:
    raise ValueError(
        f'config.eval.top_p={settings.top_p} must be above 0 and at most 1.'
    )


def _check_dual(config):
  """A constraint needs a price, and a price a constraint."""
  loss = config.loss.name
  constrained = losses.is_constrained(loss)
  if constrained == (config.dual.name == 'none'):
    raise ValueError(
        f'config.loss.name={loss!r} and '
        f'config.dual.name={config.dual.name!r} do not go together: '
        + (f'{loss} needs a dual, for example projected_ascent.' if constrained
           else f'a dual is the price of a constraint, and {loss} has none; '
           "use dual.name='none'. (A loss that has one says so, "
           'by register.with_facts(constrained=True).)')
    )
  if loss == 'r2vpo' and config.loss.center == 'mean':
    if config.learner.num_microbatches != 1:
      raise ValueError(
          "config.loss.center='mean' needs a whole mini-batch at once; use "
          'learner.num_microbatches=1 or center=one, not '
          f'num_microbatches={config.learner.num_microbatches}.'
      )


def _check_price(config):
  """What lowers a constraint must be what the multiplier hears of.

  The loss weighs a token as the normalizer says, E[c] counts each token once,
  or each sequence: where these differ, long sequences are braked more, or less,
  than the price says.
  """
  if config.loss.name != 'r2vpo' or config.loss.per != 'batch':
    return
  ratio, normalizer = config.loss.ratio, config.normalizer.name
  alike = 'sequences' if ratio == 'geometric' else 'tokens'
  if normalizers.counts_alike(normalizer) != alike:
    fitting = [
        x for x in normalizers.names() if normalizers.counts_alike(x) == alike
    ]
    raise ValueError(
        f'config.normalizer.name={normalizer!r} and '
        f'config.loss.ratio={ratio!r} of r2vpo do not go together: the '
        'constraint would be lowered by other weights than it is measured by. '
        f'Use normalizer.name={" or ".join(fitting)}.'
    )


def _check_method(config):
  """Parts of an algorithm that would silently do something else together."""
  rule = config.trust_region.name
  if config.divergence.name == 'none' and trust_regions.needs_threshold(rule):
    raise ValueError(
        f'config.trust_region.name={rule!r} drops what is beyond a threshold, '
        "and config.divergence.name='none' has none: it would drop nothing. "
        'Use a divergence with a threshold (ratio_gap, for example), or '
        "trust_region.name='outward'."
    )
  extras = config.extras
  if extras.kl_coefficient and extras.kl_where == 'loss':
    if extras.kl_estimator == 'k1':
      raise ValueError(
          "config.extras.kl_estimator='k1' in the loss holds nothing back: the "
          "mean of its gradient is 0. Use k2, k3 or full, or kl_where='reward'."
      )
  _check_price(config)
  _check_spread(config)


def _check_spread(config):
  """Who relies on groups whose rewards differ, and on whole batches."""
  name = config.advantage.name
  if advantages.teaches_without_spread(name):
    for field, value in (
        ('drop_groups_without_spread', config.drop_groups_without_spread),
        ('num_groups', config.num_groups),
        ('replay.capacity', config.replay.capacity),
    ):
      if value:
        raise ValueError(
            f'config.{field}={value} passes over groups whose rewards are all '
            f'equal, and with config.advantage.name={name!r} these teach '
            'something, too; use another advantage, or '
            f'{field}={type(value)(0)}.'
        )
  if advantages.compares_the_batch(name):
    for field, value, leaves in (
        ('replay.capacity', config.replay.capacity,
         'leaves rows empty while it fills'),
        ('drop_groups_without_spread', config.drop_groups_without_spread,
         'leaves groups out of what a loss is divided by'),
    ):
      if value:
        raise ValueError(
            f'config.{field}={value} {leaves}, and config.advantage.name='
            f'{name!r} would count them in the deviation of the batch; use '
            f'group_zscore, or {field}={type(value)(0)}.'
        )


def microbatch_choices(config: Any, *, num_batch_shards: int) -> list[int]:
  """Values of learner.num_microbatches that `check` takes, from the smallest.

  Of those that make packed rows' micro-batches equally large the smallest only.

  Args:
    config: of a run, which passes `check`; its own value does not count.
    num_batch_shards: devices over which a batch is split.
  """
  sizes = config.learner
  rows = num_completions(config) // sizes.num_minibatches
  if sizes.row_length:
    length = config.max_prompt_length + config.max_completion_length - 1
    # At most so many on a device, see `packing.make_packed`.
    rows = -(-rows // (sizes.row_length // length))
    rows = -(-rows // num_batch_shards)
    candidates = {max(2, -(-rows // size)) for size in range(1, rows + 1)}
  else:
    candidates = [k for k in range(1, rows + 1) if rows % k == 0]

  def passes(number):
    tried = with_microbatches(config, number)
    try:
      _check_parts(tried, num_batch_shards, num_batch_shards)
      _check_micro_batch(tried, num_batch_shards)
    except ValueError:
      return False
    return True

  return sorted(filter(passes, candidates))


def with_microbatches(config: Any, number: int) -> Any:
  """A copy of the config with another learner.num_microbatches."""
  config = config.copy_and_resolve_references()
  config.learner.num_microbatches = number
  return config


def num_replayed_groups(config: Any) -> int:
  """Groups that each step draws from the replay buffer; 0 without one."""
  if not config.replay.capacity:
    return 0
  return round(config.replay.ratio * config.num_prompts)


def _check_replay(config, num_batch_shards):
  """The buffer must hold what is drawn from it."""
  replay = config.replay
  if not replay.capacity:
    return
  groups = replay.ratio * config.num_prompts
  if groups != round(groups) or groups < 1:
    raise ValueError(
        f'config.replay.ratio={replay.ratio} times '
        f'num_prompts={config.num_prompts} makes {groups:g} groups; it must be '
        'a whole number of at least 1.'
    )
  if replay.ratio > replay.capacity:
    raise ValueError(
        f'config.replay.ratio={replay.ratio} asks for more rollouts than '
        f'capacity={replay.capacity} keeps; raise the capacity.'
    )
  parts = config.learner.num_minibatches * _equal_parts(config)
  if replay.sampling == 'ess':
    if 2 * replay.ratio > replay.capacity:
      raise ValueError(
          "config.replay.sampling='ess' draws twice as many groups as it "
          f'keeps: capacity={replay.capacity} must be at least twice the ratio '
          f'{replay.ratio}.'
      )
    shards = 1 if config.learner.row_length else num_batch_shards
    together = config.group_size if config.learner.share_prompts else 1
    if 2 * groups * config.group_size % (parts * shards * together):
      raise ValueError(
          f"config.replay.sampling='ess' looks at {2 * groups:g} groups of "
          f'group_size={config.group_size} in {parts} parts of equal size'
          + (f', each on {shards} devices' if shards > 1 else '')
          + '; change replay.ratio or learner.num_minibatches.'
      )
  updates = config.learner.num_epochs * config.learner.num_minibatches
  needed = (2 + config.staleness) * updates - 1
  if replay.max_age < needed:
    raise ValueError(
        f'config.replay.max_age={replay.max_age} lets nothing be replayed: '
        f'with {updates} updates a step and staleness={config.staleness}, '
        f'the youngest rollout in the buffer reaches an age of {needed}.'
    )


def _check_sizes(config):
  replayed = num_replayed_groups(config)
  available = config.num_prompts + replayed
  if not 0 <= config.num_groups <= available:
    raise ValueError(
        f'config.num_groups={config.num_groups} must be between 0 (all) and '
        f'num_prompts={config.num_prompts}'
        + (f' plus {replayed} replayed.' if replayed else '.')
    )
  groups = 'num_groups' if config.num_groups else 'num_prompts'
  count = config.num_groups or available
  batch = num_completions(config)
  updates = config.learner.num_minibatches
  parts = updates * _equal_parts(config)
  tokens = batch * (config.max_prompt_length + config.max_completion_length)
  if tokens >= 2**31:
    raise ValueError(
        f'{batch} completions of up to {tokens // batch} tokens, prompts '
        f'included, are {tokens} tokens, and they are counted in 31 bits; '
        'lower num_prompts, group_size or max_completion_length.'
    )
  beside = f' and {replayed} replayed' if count > config[groups] else ''
  sizes = (
      f'config.{groups}={config[groups]}{beside} times '
      f'group_size={config.group_size} makes {batch} completions'
  )
  for size, name in (
      (updates, f'learner.num_minibatches={updates}'),
      (parts, f'learner.num_minibatches={updates} times num_microbatches='
              f'{_equal_parts(config)}, {parts}'),
  ):
    if batch % size:
      multiple = size // math.gcd(size, config.group_size)
      raise ValueError(
          f'{sizes}, not divisible by {name}; for all groups together, '
          f'{_nearest(count, multiple)}.'
          if beside
          else f'{sizes}, not divisible by {name}; for {groups}, '
          f'{_nearest(count, multiple)}.'
      )


def _check_shards(config, num_row_shards, num_sampler_shards):
  """What stands on devices must be the same number on each."""
  sampling = num_sampler_shards, 'data, fsdp and sequence while sampling'
  for name, rows, (shards, axes) in (
      ('num_prompts', config.num_prompts,
       (num_row_shards, 'data, fsdp and sequence')),
      ('num_prompts', config.num_prompts, sampling),
      ('sampling.num_slots', config.sampling.num_slots, sampling),
      ('eval.num_slots', config.eval.num_slots, sampling),
  ):
    _check_divisible(name, rows, shards, axes)
  _check_halvings(config, num_sampler_shards)


def _check_parts(config, num_batch_shards, num_row_shards):
  """What parts of mini-batches ask of all else, and all else of them."""
  _check_dual(config)
  _check_method(config)
  _check_packing(config)
  _check_sharing(config, num_batch_shards, num_row_shards)
  _check_replay(config, num_batch_shards)
  _check_sizes(config)


def _check_micro_batch(config, num_batch_shards):
  sizes = config.learner
  if sizes.row_length:
    return
  parts = sizes.num_minibatches * _equal_parts(config)
  _check_divisible(
      'num_prompts * group_size of a micro-batch',
      num_completions(config) // parts, num_batch_shards, 'data and fsdp',
  )


def _check_divisible(name, rows, shards, axes):
  if rows % shards:
    raise ValueError(
        f'config.{name}={rows} is not divisible by the {shards} devices of '
        f'mesh axes {axes}; {_nearest(rows, shards)}.'
    )


def num_completions(config: Any) -> int:
  """That a step learns from, in all mini-batches together."""
  available = config.num_prompts + num_replayed_groups(config)
  return (config.num_groups or available) * config.group_size


def _equal_parts(config) -> int:
  """Parts of a mini-batch that must be equal; those of packed rows need not."""
  sizes = config.learner
  return 1 if sizes.row_length else max(1, sizes.num_microbatches)


def _check_packing(config):
  length = config.learner.row_length
  needed = config.max_prompt_length + config.max_completion_length - 1
  if length and length < needed:
    raise ValueError(
        f'config.learner.row_length={length} has no room for '
        f'max_prompt_length={config.max_prompt_length} and '
        f'max_completion_length={config.max_completion_length}; use at least '
        f'{needed}, or 0 for a row for each completion.'
    )
  if length and config.learner.num_microbatches == 1:
    raise ValueError(
        f'config.learner.row_length={length} packs rows, but with '
        'learner.num_microbatches=1 all are computed, filled or not; use more '
        'micro-batches, for example 8, or row_length=0.'
    )
  _check_halved_rows(config.learner)


def _check_reuse(config):
  """Whether what the sampler's kernels made is what the learner's would."""
  asked = 'config.learner.reuse_forward=True'
  for name, needed in (
      ('learner.num_epochs', 1),
      ('learner.num_minibatches', 1),
      ('staleness', 0),
      ('replay.capacity', 0),
  ):
    value = _get(config, name)
    if value != needed:
      raise ValueError(
          f'{asked} is for updates of the parameters that sampled, and with '
          f'config.{name}={value} some are of others; use {name}={needed}, or '
          'reuse_forward=False.'
      )
  dtype = config.model.dtype
  for name in ('dtype', 'weights_dtype', 'cache_dtype'):
    if config.sampling[name] not in ('', dtype):
      raise ValueError(
          f'{asked} needs a sampler that computes as the learner does, and '
          f'config.sampling.{name}={config.sampling[name]!r} is not '
          f'model.dtype={dtype!r}; use that, or reuse_forward=False.'
      )
  # A sampler reads kernels with the adapters in them, and rounds the sum.
  for name in ('dtype', 'params_dtype'):
    if config.lora.rank and config.model[name] != 'float32':
      raise ValueError(
          f'{asked} with config.lora.rank={config.lora.rank} needs a sampler '
          'that does not round what adapters change, and config.model.'
          f"{name}={config.model[name]!r}; use 'float32', or "
          'reuse_forward=False.'
      )


def _check_halved_rows(sizes):
  """Whether packed rows can be halved, see `packing.make_packed`."""
  asked = _asked_halvings('learner', sizes)
  if sizes.num_halvings and not sizes.row_length:
    raise ValueError(
        f'{asked} halves packed rows, and learner.row_length=0 packs none; set '
        'row_length, for example to 256, or use num_halvings=0.'
    )
  divisor = halvings.divisor(sizes.num_halvings, sizes.halving_steps)
  if sizes.row_length % divisor:
    # Not the multiple below, which may have no room for a completion.
    longer = -(-sizes.row_length // divisor) * divisor
    raise ValueError(
        f'{asked} halves rows so many times, and learner.row_length='
        f'{sizes.row_length} cannot be; use row_length={longer}, or fewer '
        'halvings.'
    )


def _check_sharing(config, num_batch_shards, num_row_shards):
  """Whether groups can stay together, see `packing.make_grouped`."""
  sizes = config.learner
  if not sizes.share_prompts:
    return
  asked = 'config.learner.share_prompts=True'
  if sizes.row_length:
    raise ValueError(
        f'{asked} is for rows as sampled, and learner.row_length='
        f'{sizes.row_length} packs them, with a prompt once for what shares a '
        'row already; use row_length=0 or share_prompts=False.'
    )
  if config.max_prompt_length < 2:
    raise ValueError(
        f'{asked} shares what is before the last token of a prompt, and '
        'max_prompt_length=1 leaves nothing; use share_prompts=False.'
    )
  if num_row_shards != num_batch_shards:
    raise ValueError(
        f'{asked} takes whole rows, and mesh.sequence='
        f'{num_row_shards // num_batch_shards} splits them; use sequence=1 or '
        'share_prompts=False.'
    )
  groups = num_completions(config) // config.group_size
  parts = sizes.num_minibatches * _equal_parts(config)
  if groups % (parts * num_batch_shards):
    on = f', each on {num_batch_shards} devices' if num_batch_shards > 1 else ''
    raise ValueError(
        f'{asked} keeps groups together, and {groups} are not divisible into '
        f'learner.num_minibatches={sizes.num_minibatches} times '
        f'num_microbatches={_equal_parts(config)} parts{on}; '
        f'{_nearest(groups, parts * num_batch_shards)}, or '
        'share_prompts=False.'
    )


def _check_slots(section, num_slots, config, *factors):
  sizes = [_get(config, name) for name in factors]
  if not 0 <= num_slots <= math.prod(sizes):
    raise ValueError(
        f'config.{section}.num_slots={num_slots} must be between 0 (all) and '
        f'the {math.prod(sizes)} completions of {factors[0]}={sizes[0]} times '
        f'{factors[1]}={sizes[1]}.'
    )


def _check_stages(config):
  sizes, length = config.sampling, config.max_completion_length
  asked = f'config.sampling.num_stages={sizes.num_stages}'
  if not 0 <= sizes.num_stages <= length:
    raise ValueError(
        f'{asked} must be between 0 (as many as pay) and the '
        f'max_completion_length={length} tokens that stages share.'
    )
  for name in ('num_slots', 'num_halvings'):
    if sizes.num_stages > 1 and sizes[name]:
      raise ValueError(
          f'{asked} are of all completions at once, and slots have one cache, '
          f'which is always full; use num_stages=0, or {name}=0 (now '
          f'{sizes[name]}).'
      )


def _asked_halvings(section, sizes) -> str:
  """What errors call the halvings that were asked for, if any can be."""
  for name, smallest in (('num_halvings', 0), ('halving_steps', 1)):
    if sizes[name] < smallest:
      raise ValueError(
          f'config.{section}.{name}={sizes[name]} must be {smallest} or more.'
      )
  asked = f'config.{section}.num_halvings={sizes.num_halvings}'
  if sizes.halving_steps > 1:
    if not sizes.num_halvings:
      raise ValueError(
          f'config.{section}.halving_steps={sizes.halving_steps} are to each '
          f'half, and {asked} makes none; use num_halvings=1 or more, or '
          'halving_steps=1.'
      )
    asked += f' with halving_steps={sizes.halving_steps}'
  return asked


def _check_halvings(config, num_sampler_shards):
  sizes = config.sampling
  asked = _asked_halvings('sampling', sizes)
  divisor = num_sampler_shards * halvings.divisor(
      sizes.num_halvings, sizes.halving_steps
  )
  slots = sizes.num_slots or config.num_prompts * config.group_size
  if slots % divisor:
    name = 'num_slots' if sizes.num_slots else 'num_prompts * group_size'
    on = (
        f' on each of {num_sampler_shards} devices'
        if num_sampler_shards > 1 else ''
    )
    raise ValueError(
        f'{asked} halves slots so many times, and {name}={slots} cannot be{on}'
        f'; {_nearest(slots, divisor)}, or fewer halvings.'
    )


def _nearest(size: int, divisor: int) -> str:
  """'try 96 or 104': the multiples of `divisor` around `size`."""
  below = size // divisor * divisor
  above = below + divisor
  return f'try {below} or {above}' if below else f'try {above}'
