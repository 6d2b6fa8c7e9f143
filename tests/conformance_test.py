"""What must hold for everything that is registered, whatever its name."""

import functools

import hand_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import advantages
from dppo_jax import algorithms
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax import penalties
from dppo_jax import shaping
from dppo_jax import trust_regions
from dppo_jax.types import LossInputs

pytestmark = pytest.mark.usefixtures('no_nans')

VOCABULARY = 24  # More than the 20 that top-K remembers by default.

each_divergence = pytest.mark.parametrize('name', divergences.names())
each_loss = pytest.mark.parametrize('name', losses.names())
each_region = pytest.mark.parametrize('name', trust_regions.names())
each_advantage = pytest.mark.parametrize('name', advantages.names())
# All but the reward itself compare completions with each other.
each_baseline = pytest.mark.parametrize(
    'name', [
        name for name in advantages.names()
        if not advantages.teaches_without_spread(name)
    ]
)
each_shaping = pytest.mark.parametrize('name', shaping.names())
each_estimator = pytest.mark.parametrize('name', penalties.ESTIMATORS)
each_normalizer = pytest.mark.parametrize('name', normalizers.names())
each_dual = pytest.mark.parametrize(
    'name', [name for name in duals.names() if name != 'none']
)


@pytest.mark.parametrize(
    'registered, numbers',
    [
        (divergences.names(), hand_numbers.DIVERGENCES),
        (trust_regions.names(), hand_numbers.REGIONS),
        (losses.names(), hand_numbers.LOSSES),
        (advantages.names(), hand_numbers.ADVANTAGES),
        (shaping.names(), hand_numbers.SHAPINGS),
        (normalizers.names(), hand_numbers.NORMALIZERS),
        (duals.names(), hand_numbers.DUALS),
        (list(penalties.ESTIMATORS), hand_numbers.ESTIMATORS),
        (algorithms.names(), hand_numbers.ALGORITHMS),
        (algorithms.names(), hand_numbers.PAPER_SETTINGS),
    ],
    ids=['divergence', 'region', 'loss', 'advantage', 'shaping', 'normalizer',
         'dual', 'estimator', 'row', 'settings'],
)
def test_every_name_has_a_hand_number(registered, numbers):
  without = [name for name in registered if not numbers.get(name)]
  assert not without, f'{without}: add a line to tests/hand_numbers.py'
  unknown = set(numbers) - set(registered)
  assert not unknown, f'hand numbers for names that do not exist: {unknown}'


# --- divergences -------------------------------------------------------------


def random_pair(*shape, dtype=jnp.float32):
  """Behaviour logits, target logits [*shape, V] and tokens [*shape]."""
  keys = jax.random.split(jax.random.key(0), 3)
  behaviour = 2 * jax.random.normal(keys[0], (*shape, VOCABULARY))
  target = behaviour + jax.random.normal(keys[1], (*shape, VOCABULARY))
  tokens = jax.random.randint(keys[2], shape, 0, VOCABULARY)
  return behaviour.astype(dtype), target.astype(dtype), tokens


def eager(name, behaviour, target, tokens):
  return hand_numbers.distance(
      divergences.build(name), behaviour=behaviour, target=target, tokens=tokens
  )


measured = jax.jit(eager, static_argnums=0)


@each_divergence
def test_divergence_gives_its_hand_numbers(name):
  for mu, pi, token, options, value in hand_numbers.DIVERGENCES[name]:
    got = hand_numbers.distance(
        divergences.build(name, **options),
        behaviour=hand_numbers.logs(mu),
        target=hand_numbers.logs(pi),
        tokens=jnp.asarray(token),
    )
    np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-6)


@each_divergence
def test_divergence_of_equal_policies_is_zero(name):
  logits, _, tokens = random_pair(64)
  got = measured(name, logits, logits, tokens)
  np.testing.assert_allclose(got, np.zeros(64), atol=1e-6)


@each_divergence
def test_divergence_does_not_see_a_shift_of_the_logits(name):
  behaviour, target, tokens = random_pair(64)
  np.testing.assert_allclose(
      measured(name, behaviour + 5, target - 7, tokens),
      measured(name, behaviour, target, tokens),
      rtol=1e-4,
      atol=1e-5,
  )


@each_divergence
def test_divergence_is_finite_and_not_negative(name):
  got = measured(name, *random_pair(64))
  assert got.dtype == jnp.float32
  assert jnp.all(jnp.isfinite(got)) and jnp.all(got >= 0)


@each_divergence
@pytest.mark.parametrize('impossible', [-np.inf, -200.0])
def test_divergence_is_defined_where_the_sampled_token_is_certain_or_impossible(
    name, impossible
):
  # Token 0 has probability 0, 1/V and 1 under either policy; -200 is finite,
  # but its exponential is not told from 0.
  never = np.zeros(VOCABULARY)
  never[0] = impossible
  always = np.full(VOCABULARY, impossible)
  always[0] = 0
  policies = np.stack([never, np.zeros(VOCABULARY), always])
  behaviour = jnp.asarray(np.repeat(policies, 3, axis=0), jnp.float32)
  target = jnp.asarray(np.tile(policies, (3, 1)), jnp.float32)
  tokens = jnp.zeros(9, jnp.int32)

  # Op by op: a NaN that a later `where` hides would still be one too many.
  got = eager(name, behaviour, target, tokens)
  assert not jnp.any(jnp.isnan(got))
  assert jnp.all(got >= 0)
  if name != 'ratio_gap':  # A ratio to probability 0 is infinite by nature.
    assert jnp.all(jnp.isfinite(got))
  np.testing.assert_allclose(got[::4], jnp.zeros(3), atol=1e-6)  # mu = pi.


@each_divergence
def test_divergence_is_the_same_in_jit_in_vmap_and_in_any_batch_shape(name):
  behaviour, target, tokens = random_pair(2, 3)
  fn = functools.partial(measured, name)
  plain = eager(name, behaviour, target, tokens)
  assert plain.shape == (2, 3)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  close(fn(behaviour, target, tokens), plain)
  close(jax.vmap(fn)(behaviour, target, tokens), plain)
  close(jax.vmap(jax.vmap(fn))(behaviour, target, tokens), plain)
  flat = [x.reshape(6, *x.shape[2:]) for x in (behaviour, target, tokens)]
  close(fn(*flat), plain.ravel())
  close(fn(behaviour[1, 2], target[1, 2], tokens[1, 2]), plain[1, 2])


@each_divergence
def test_divergence_of_bfloat16_logits_is_computed_in_float32(name):
  behaviour, target, tokens = random_pair(2, 3, dtype=jnp.bfloat16)
  got = measured(name, behaviour, target, tokens)
  upcast = (behaviour.astype(jnp.float32), target.astype(jnp.float32), tokens)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, measured(name, *upcast))


@each_divergence
def test_record_is_a_pytree_that_scan_can_stack(name):
  divergence = divergences.build(name)
  behaviour, target, tokens = random_pair(2, 3)

  def sample(carry, inputs):
    return carry, divergence.record(*inputs)

  _, recorded = jax.lax.scan(sample, (), (behaviour, tokens))
  for leaf in jax.tree.leaves(recorded):
    assert leaf.shape[:2] == (2, 3)
  np.testing.assert_allclose(
      divergence.measure(target, tokens, recorded),
      measured(name, behaviour, target, tokens),
      rtol=1e-4,
      atol=1e-6,
  )


@each_divergence
def test_padding_gives_no_gradient_whatever_its_numbers(name):
  behaviour, target, tokens = random_pair(2, 4)
  mask = jnp.asarray([[1, 1, 0, 0], [1, 0, 1, 0]], bool)
  spoiled = np.asarray([[0, 0, np.nan, np.inf], [0, -np.inf, 0, np.nan]])
  divergence = divergences.build(name)
  logprobs = np.asarray(divergences.token_logprobs(target, tokens))
  anchors = np.asarray(divergences.token_logprobs(behaviour, tokens))
  distances = np.asarray(measured(name, behaviour, target, tokens))
  signs = np.asarray([[1.0, -1, 1, -1], [-1, 1, 1, -1]])

  def gradient(padding):
    def loss(logprobs):
      region = divergences.trust_region(
          divergence=f32(distances + padding),
          log_ratio=f32(logprobs_in - anchors),
          advantages=f32(signs + padding),
          threshold=divergence.threshold,
      )
      inputs = LossInputs(
          logprobs=logprobs,
          behaviour_logprobs=f32(anchors - padding),
          divergence=f32(distances + padding),
          trust_region=region,
          advantages=f32(signs + padding),
          token_mask=mask,
      )
      return jnp.sum(losses.build('policy_gradient')(inputs)[0])

    logprobs_in = logprobs + padding
    return jax.value_and_grad(loss)(f32(logprobs_in))

  clean_loss, clean = gradient(np.zeros((2, 4)))
  with jax.debug_nans(False), np.errstate(invalid='ignore'):
    loss, got = gradient(spoiled)  # NaN goes in here, on purpose.
  np.testing.assert_array_equal(loss, clean_loss)
  np.testing.assert_array_equal(got, clean)
  np.testing.assert_array_equal(np.asarray(got)[~np.asarray(mask)], np.zeros(4))


def f32(values):
  return jnp.asarray(values, jnp.float32)


# --- losses ------------------------------------------------------------------

# Their price is on the ratio, whatever the advantage.
BRAKES_WITHOUT_ADVANTAGE = ('r2vpo',)


def build_loss(name, **options):
  """A loss that knows lambda and the limit, if it asks for them."""
  loss_fn = losses.build(name, **options)
  return lambda inputs: loss_fn(inputs._replace(
      multiplier=hand_numbers.MULTIPLIER, limit=hand_numbers.LIMIT
  ))


def loss_inputs(**changes):
  """Two sequences of three tokens; the last one of the second is padding."""
  fields = {
      'logprobs': np.log([[0.8, 0.15, 0.6], [0.2, 0.65, 0.25]]),
      'behaviour_logprobs': np.log([[0.5, 0.1, 0.9], [0.4, 0.6, 0.25]]),
      'divergence': [[0.3, 0.05, 0.3], [0.2, 0.05, 0.0]],
      'advantages': [[1.0, 1, 1], [-1, -1, -1]],
  }
  flags = {
      'trust_region': [[False, True, True], [False, True, True]],
      'token_mask': [[True, True, True], [True, True, False]],
  }
  arrays = {key: f32(value) for key, value in fields.items()}
  arrays |= {key: jnp.asarray(value) for key, value in flags.items()}
  return LossInputs(**(arrays | changes))


def loss_and_gradient(loss_fn, inputs):
  """Summed loss and its gradient by logprobs [B, T]."""

  def total(logprobs):
    loss, metrics = loss_fn(inputs._replace(logprobs=logprobs))
    assert loss.shape == inputs.logprobs.shape and loss.dtype == jnp.float32
    for leaf in jax.tree.leaves(metrics):
      assert leaf.shape == loss.shape
    return jnp.sum(loss)

  return jax.value_and_grad(total)(inputs.logprobs)


@each_loss
def test_loss_gives_its_hand_numbers(name):
  for options, mu, pi, advantage, value, slope in hand_numbers.LOSSES[name]:
    mu, pi = np.atleast_2d(mu), np.atleast_2d(pi)
    inputs = LossInputs(
        logprobs=hand_numbers.logs(pi),
        behaviour_logprobs=hand_numbers.logs(mu),
        divergence=f32(np.abs(mu - pi)),
        trust_region=jnp.ones(mu.shape, bool),
        advantages=jnp.full(mu.shape, advantage, jnp.float32),
        token_mask=jnp.ones(mu.shape, bool),
    )
    loss, gradient = loss_and_gradient(build_loss(name, **options), inputs)
    np.testing.assert_allclose(loss, value, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(
        gradient, np.atleast_2d(slope), rtol=1e-5, atol=5e-6
    )


@each_loss
def test_loss_has_a_constraint_if_it_says_so(name):
  _, metrics = build_loss(name)(loss_inputs())
  assert ('constraint' in metrics) == losses.is_constrained(name)


@each_loss
@pytest.mark.parametrize('spoiler', [np.nan, np.inf, -np.inf])
def test_loss_and_gradient_do_not_see_padding(name, spoiler):
  loss_fn = build_loss(name)
  inputs = loss_inputs()
  fields = ('logprobs', 'behaviour_logprobs', 'divergence', 'advantages')
  loss, gradient = loss_and_gradient(loss_fn, inputs)
  with jax.debug_nans(False):  # NaN goes in here, on purpose.
    inputs = inputs._replace(trust_region=inputs.trust_region.astype(float))
    spoiled = inputs._replace(**{
        field: getattr(inputs, field).at[1, 2].set(spoiler)
        for field in (*fields, 'trust_region')
    })
    loss_spoiled, gradient_spoiled = loss_and_gradient(loss_fn, spoiled)
  np.testing.assert_array_equal(loss_spoiled, loss)
  np.testing.assert_array_equal(gradient_spoiled, gradient)
  assert gradient_spoiled[1, 2] == 0


@each_loss
def test_advantage_zero_gives_no_gradient_but_a_brake_even_at_infinite_ratio(
    name,
):
  inputs = loss_inputs(
      advantages=jnp.zeros((2, 3)), trust_region=jnp.ones((2, 3), bool)
  )
  inputs = inputs._replace(
      behaviour_logprobs=inputs.behaviour_logprobs.at[0, 0].set(-1000.0)
  )
  loss, gradient = loss_and_gradient(build_loss(name), inputs)
  assert jnp.isfinite(loss)
  if name in BRAKES_WITHOUT_ADVANTAGE:
    # r 2 lambda (r - 1); e^20 bounds the ratio, and the last is padding.
    r = np.exp([[20, 0, 0], [0, 0, 0]]) * [[1, 1.5, 2 / 3], [0.5, 13 / 12, 1]]
    brake = 2 * hand_numbers.MULTIPLIER * r * (r - 1)
    np.testing.assert_allclose(gradient, brake, rtol=1e-4)
    assert np.all(brake[:, 1] > 0)
  else:
    np.testing.assert_array_equal(gradient, jnp.zeros((2, 3)))


@each_loss
def test_dropped_token_with_log_ratio_100_leaves_the_loss_finite(name):
  # Token (0, 0) is outside the region. exp(100) is infinite in float32.
  inputs = loss_inputs()
  inputs = inputs._replace(
      behaviour_logprobs=inputs.logprobs.at[0, 0].add(-100.0)
  )
  loss, gradient = loss_and_gradient(build_loss(name), inputs)
  assert jnp.isfinite(loss) and jnp.all(jnp.isfinite(gradient))
  assert gradient[0, 0] == 0


@each_loss
def test_kept_token_with_log_ratio_100_is_not_hidden_unless_capped(name):
  # (0, 1) is inside the region: the learner must see it and skip the update.
  inputs = loss_inputs()
  inputs = inputs._replace(
      behaviour_logprobs=inputs.logprobs.at[0, 1].add(-100.0)
  )
  loss, gradient = loss_and_gradient(build_loss(name), inputs)
  if name in ('spo', 'drpo', 'r2vpo'):
    # Nothing drops a token, so e^20 bounds the ratio: enormous, not infinite.
    assert jnp.isfinite(loss) and jnp.all(jnp.isfinite(gradient))
    # Spo: r^2 / 12.5 = e^40 / 12.5; drpo has mu = .15 e^-100 = 0 before it;
    # r2vpo 2 lambda r^2 with lambda .04.
    expected = {
        'spo': np.exp(40) / 12.5,
        'drpo': -np.exp(20),
        'r2vpo': 0.08 * np.exp(40),
    }
    np.testing.assert_allclose(gradient[0, 1], expected[name], rtol=1e-4)
    return
  assert not jnp.isfinite(loss)
  capped = losses.build(name, ratio_cap=5.0)
  loss, gradient = loss_and_gradient(capped, inputs)
  assert jnp.isfinite(loss) and jnp.all(jnp.isfinite(gradient))
  np.testing.assert_allclose(gradient[0, 1], -5.0)


@each_loss
def test_soft_region_multiplies_the_gradient(name):
  loss_fn, inputs = build_loss(name), loss_inputs()
  whole = inputs._replace(trust_region=jnp.ones((2, 3)))
  half = inputs._replace(trust_region=f32([[0.5, 1, 0], [0.25, 1, 1]]))
  factors = f32([[0.5, 1, 0], [0.25, 1, 0]])  # The last token is padding.
  np.testing.assert_allclose(
      loss_and_gradient(loss_fn, half)[1],
      factors * loss_and_gradient(loss_fn, whole)[1],
      rtol=1e-6,
  )


@each_loss
def test_loss_is_the_same_in_vmap_and_float32_of_bfloat16(name):
  loss_fn, inputs = build_loss(name), loss_inputs()
  inputs = inputs._replace(segment_ids=jnp.ones((2, 3), jnp.int32))
  plain, _ = loss_fn(inputs)
  batched, _ = jax.vmap(loss_fn)(jax.tree.map(lambda x: x[:, None], inputs))
  np.testing.assert_allclose(batched[:, 0], plain, rtol=1e-6)
  rough = jax.tree.map(to_bfloat16, inputs)
  for dtype in (jnp.float32, jnp.bfloat16):
    loss, _ = loss_fn(jax.tree.map(functools.partial(upcast, dtype), rough))
    assert jnp.all(jnp.isfinite(loss.astype(jnp.float32)))
    np.testing.assert_allclose(
        loss.astype(jnp.float32), plain, rtol=0.1, atol=0.02
    )


def to_bfloat16(x):
  return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


def upcast(dtype, x):
  return x.astype(dtype) if x.dtype == jnp.bfloat16 else x


@each_loss
def test_loss_is_the_same_in_jit(name):
  loss_fn = build_loss(name)
  plain, plain_metrics = loss_fn(loss_inputs())
  jitted, jitted_metrics = jax.jit(loss_fn)(loss_inputs())
  np.testing.assert_allclose(jitted, plain, rtol=1e-6)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6),
      jitted_metrics,
      plain_metrics,
  )


# --- trust regions -----------------------------------------------------------


def region_inputs(*, behaviour, target, advantages, threshold=0.15, **changes):
  """One sequence a row, D = |mu - pi|. Probabilities [B, T]."""
  behaviour, target = np.asarray(behaviour), np.asarray(target)
  log_ratio = hand_numbers.logs(target) - hand_numbers.logs(behaviour)
  inputs = trust_regions.RegionInputs(
      divergence=f32(np.abs(behaviour - target)),
      log_ratio=log_ratio,
      direction=log_ratio,
      anchor_logprobs=hand_numbers.logs(behaviour),
      advantages=f32(advantages),
      token_mask=jnp.ones(behaviour.shape, bool),
      segment_ids=jnp.ones(behaviour.shape, jnp.int32),
      threshold=threshold,
  )
  return inputs._replace(**changes)


def random_region_inputs(threshold=0.15):
  """Rows with tokens inside, outside and at all ratios; some are padding."""
  rng = np.random.RandomState(0)
  behaviour, target = rng.uniform(0.01, 0.99, (2, 6, 8))
  mask = rng.uniform(size=(6, 8)) < 0.7
  return region_inputs(
      behaviour=behaviour,
      target=target,
      advantages=rng.choice([-1.0, 0.0, 2.0], (6, 8)),
      threshold=threshold,
      token_mask=jnp.asarray(mask),
      segment_ids=jnp.asarray(np.repeat([[1] * 3 + [2] * 5], 6, 0)),
  )


@each_region
def test_region_gives_its_hand_numbers(name):
  for case in hand_numbers.REGIONS[name]:
    options, threshold, behaviour, target, advantages, kept = case
    inputs = region_inputs(
        behaviour=[behaviour],
        target=[target],
        advantages=[advantages],
        threshold=threshold,
    )
    got = trust_regions.build(name, **options)(inputs)
    np.testing.assert_allclose(
        got.astype(jnp.float32), [kept], rtol=1e-5, err_msg=str(case)
    )


@each_region
def test_region_is_a_mask_or_weights_up_to_one_the_same_in_jit_and_vmap(name):
  region_fn, inputs = trust_regions.build(name), random_region_inputs()
  region = region_fn(inputs)
  assert region.shape == (6, 8) and region.dtype in (bool, jnp.float32)
  assert jnp.all((region >= 0) & (region <= 1))
  np.testing.assert_array_equal(jax.jit(region_fn)(inputs), region)
  one_by_one = jax.tree.map(
      lambda x: x[:, None] if hasattr(x, 'shape') else x, inputs
  )
  axes = inputs._replace(**{k: 0 for k in inputs._fields})
  axes = axes._replace(threshold=None)
  mapped = jax.vmap(region_fn, in_axes=(axes,))(one_by_one)
  np.testing.assert_array_equal(mapped[:, 0], region)


@each_region
def test_region_keeps_everything_of_equal_policies(name):
  inputs = region_inputs(
      behaviour=[[0.2, 0.5, 0.9]],
      target=[[0.2, 0.5, 0.9]],
      advantages=[[1.0, -1.0, 0.0]],
  )
  np.testing.assert_array_equal(trust_regions.build(name)(inputs), [[1, 1, 1]])


@each_region
def test_region_hides_no_nan_from_who_counts_skipped_updates(name):
  clean = random_region_inputs(threshold=0.5)
  at = clean.token_mask & (clean.advantages != 0)
  spoil = lambda x: jnp.where(at, jnp.nan, x)
  with jax.debug_nans(False):
    region = trust_regions.build(name)(clean._replace(
        divergence=spoil(clean.divergence),
        log_ratio=spoil(clean.log_ratio),
        direction=spoil(clean.direction),
    ))
    dropped = region == 0
  assert not jnp.any(dropped & at)


@pytest.mark.parametrize('name', ['outward', 'relaxed', 'dual_clip'])
def test_region_that_limits_tokens_says_so_and_keeps_those_within(name):
  assert trust_regions.limits_tokens(name)
  inputs = random_region_inputs(threshold=0.15)
  region_fn = trust_regions.build(name)
  within = inputs.divergence <= 0.15
  if name == 'dual_clip':  # It drops by the ratio, too.
    within &= inputs.log_ratio < 0
  assert jnp.all(region_fn(inputs) | ~within)
  assert not jnp.all(region_fn(inputs))


def test_no_other_region_says_that_it_limits_tokens():
  assert sum(map(trust_regions.limits_tokens, trust_regions.names())) == 3


@each_region
def test_region_that_says_it_needs_a_threshold_drops_nothing_without(name):
  inputs = random_region_inputs(threshold=np.inf)
  keeps_all = bool(jnp.all(trust_regions.build(name)(inputs) == 1))
  # `outward` without a threshold is what algorithms without a region have.
  assert keeps_all == (trust_regions.needs_threshold(name) or name == 'outward')


@each_region
def test_no_gradient_flows_through_a_region(name):
  inputs = random_region_inputs(threshold=0.1)
  loss_fn = losses.build('policy_gradient')
  options = {'soft': True} if name == 'cumulative_prefix' else {}
  region_fn = trust_regions.build(name, **options)

  def total(divergence, log_ratio):
    region = region_fn(
        inputs._replace(divergence=divergence, log_ratio=log_ratio)
    )
    values, _ = loss_fn(LossInputs(
        logprobs=inputs.anchor_logprobs,
        behaviour_logprobs=inputs.anchor_logprobs,
        divergence=divergence,
        trust_region=region,
        advantages=inputs.advantages,
        token_mask=inputs.token_mask,
        segment_ids=inputs.segment_ids,
    ))
    return jnp.sum(values)

  slopes = jax.grad(total, argnums=(0, 1))(inputs.divergence, inputs.log_ratio)
  assert not jnp.any(jnp.stack(slopes))


@each_region
@pytest.mark.parametrize('spoiler', [np.nan, np.inf, -np.inf])
def test_region_and_its_gradient_do_not_see_padding(name, spoiler):
  clean = random_region_inputs(threshold=0.5)
  mask = clean.token_mask
  spoil = lambda x: jnp.where(mask, x, spoiler)
  # Of the losses the one that looks at most tokens at a time.
  loss_fn = losses.build('policy_gradient', ratio='sequence')

  def run(inputs):
    region = trust_regions.build(name)(inputs)

    def total(logprobs):
      values, _ = loss_fn(LossInputs(
          logprobs=logprobs,
          behaviour_logprobs=inputs.anchor_logprobs,
          divergence=inputs.divergence,
          trust_region=region,
          advantages=inputs.advantages,
          token_mask=mask,
          segment_ids=inputs.segment_ids,
      ))
      return jnp.sum(values)

    logprobs = inputs.anchor_logprobs + inputs.log_ratio
    return region, *jax.value_and_grad(total)(logprobs)

  with jax.debug_nans(False):  # NaN goes in here, on purpose.
    dirty = run(clean._replace(**{
        field: spoil(getattr(clean, field))
        for field in ('divergence', 'log_ratio', 'direction', 'advantages',
                      'anchor_logprobs')
    }))
  region, value, slopes = run(clean)
  np.testing.assert_array_equal(dirty[0][mask], region[mask])
  np.testing.assert_array_equal(dirty[1], value)
  np.testing.assert_array_equal(dirty[2], slopes)
  assert jnp.all(slopes[~mask] == 0) and jnp.any(slopes[mask] != 0)


@each_region
def test_region_of_bfloat16_is_finite(name):
  inputs = random_region_inputs()._replace(threshold=0.15)
  rough = jax.tree.map(
      lambda x: to_bfloat16(x) if hasattr(x, 'dtype') else x, inputs
  )
  region = trust_regions.build(name)(rough).astype(jnp.float32)
  assert jnp.all((region >= 0) & (region <= 1))
  # A threshold is hardly ever hit within the rounding.
  exact = trust_regions.build(name)(inputs)
  assert jnp.mean(jnp.abs(region - exact) > 0.05) < 0.1


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('relaxed', {'side': 'hihg'}, "Did you mean 'high'"),
        ('dual_clip', {'ratio_limit': 1.0}, 'ratio_limit=1.0 must be above 1'),
        ('band', {'lowest': 2.0}, 'lowest=2.0 and highest=5.0'),
        ('sequence_divergence', {'statistic': 'maxx'}, "Did you mean 'max'"),
    ],
)
def test_region_that_cannot_be_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    trust_regions.build(name, **options)


# --- advantages --------------------------------------------------------------


@each_advantage
def test_advantage_gives_its_hand_numbers(name):
  for options, rewards, expected in hand_numbers.ADVANTAGES[name]:
    advantage_fn = advantages.build(name, **options)
    for fn in (advantage_fn, jax.jit(advantage_fn)):
      np.testing.assert_allclose(fn(f32(rewards)), expected, rtol=1e-5)


@each_baseline
@pytest.mark.parametrize('group_size', [3, 8])
def test_group_without_variance_has_exactly_no_advantage(name, group_size):
  # The mean of eight times 0.7 is not 0.7 in float32.
  advantage_fn = advantages.build(name, group_size=group_size)
  rewards = np.repeat([0.0, 1.0, 0.1, 0.7, -1 / 3, 1e4 + 0.1], group_size)
  for fn in (advantage_fn, jax.jit(advantage_fn)):
    np.testing.assert_array_equal(fn(f32(rewards)), np.zeros(6 * group_size))


@each_baseline
def test_advantages_of_a_group_sum_to_zero_and_ignore_the_other_groups(name):
  advantage_fn = advantages.build(name, group_size=4)
  rewards = jax.random.uniform(jax.random.key(0), (12,))
  got = advantage_fn(rewards)
  assert got.shape == (12,) and got.dtype == jnp.float32
  np.testing.assert_allclose(got.reshape(3, 4).sum(-1), jnp.zeros(3), atol=1e-5)
  changed = advantage_fn(rewards.at[:4].add(jnp.arange(4.0)))
  if advantages.compares_the_batch(name):  # Their spread sets the scale of all.
    assert jnp.all(jnp.abs(changed[4:]) < jnp.abs(got[4:]))
    got = got * changed[4] / got[4]
    np.testing.assert_allclose(changed[4:], got[4:], rtol=1e-4)
  else:
    np.testing.assert_array_equal(changed[4:], got[4:])


@each_advantage
def test_advantage_that_says_so_teaches_without_spread(name):
  required = advantages.register.required(name)
  known = {x: 4 for x in required if x == 'group_size'}
  advantage = advantages.build(name, **known)(jnp.full(8, 0.7))
  assert jnp.any(advantage != 0) == advantages.teaches_without_spread(name)


@each_advantage
def test_advantage_is_the_same_in_vmap_and_finite_in_bfloat16(name):
  known = {'group_size': 4} if name != 'raw' else {}
  advantage_fn = advantages.build(name, **known)
  rewards = jax.random.uniform(jax.random.key(0), (3, 8))
  each = jnp.stack([advantage_fn(row) for row in rewards])
  np.testing.assert_allclose(
      jax.vmap(advantage_fn)(rewards), each, rtol=1e-5, atol=1e-6
  )
  rough = advantage_fn(rewards[0].astype(jnp.bfloat16))
  np.testing.assert_allclose(
      rough.astype(jnp.float32), each[0], rtol=0.05, atol=0.05
  )


# --- duals -------------------------------------------------------------------


def test_no_dual_is_none():
  assert duals.build('none') is None


@each_dual
def test_dual_gives_its_hand_numbers(name):
  for options, violations, multipliers in hand_numbers.DUALS[name]:
    rule = duals.build(name, **options)
    for update in (rule.update, jax.jit(rule.update)):
      dual = rule.init()
      for violation, multiplier in zip(violations, multipliers, strict=True):
        dual = update(dual, f32(violation))
        assert dual.multiplier.dtype == jnp.float32
        np.testing.assert_allclose(
            dual.multiplier, [multiplier], rtol=2e-5, atol=1e-7
        )


@each_dual
@pytest.mark.parametrize('by_age', [False, True])
def test_dual_stays_as_it_is_where_nothing_was_seen(name, by_age):
  if by_age and 'by_age' not in duals.register.options(name):
    by_age = False  # One multiplier only, by its signature.
  rule = duals.build(name, **({'by_age': True} if by_age else {}))
  dual = rule.init()
  size = len(dual.multiplier)
  assert rule.by_age == by_age and size == (8 if by_age else 1)
  moved = rule.update(dual, jnp.full(size, 0.1))
  seen = jnp.arange(size) > 0
  with jax.debug_nans(False):  # What a mean over nothing may be.
    violation = jnp.full(size, 0.1).at[0].set(jnp.nan)
    after = rule.update(moved, violation, seen)
  assert after.multiplier[0] == moved.multiplier[0]
  assert after.integral[0] == moved.integral[0]
  twice = rule.update(moved, jnp.full(size, 0.1))
  np.testing.assert_array_equal(after.multiplier[1:], twice.multiplier[1:])


@each_dual
def test_dual_stays_within_its_clamp_whatever_the_violation(name):
  rule = duals.build(name)
  options = duals.register.options(name)
  lowest = options.get('minimum', 0.0)
  highest = options.get('maximum', options.get('multiplier'))
  dual = rule.init()
  for violation in (1e30, -1e30, 1e30, 0.0, -1e30):
    dual = rule.update(dual, f32(violation))
    assert lowest <= dual.multiplier[0] <= highest * (1 + 1e-6)


@each_dual
def test_dual_with_an_impossible_limit_is_refused(name):
  with pytest.raises(ValueError, match='limit=0.0 is not positive'):
    duals.build(name, limit=0.0)


# --- shaping and penalties ---------------------------------------------------


@each_shaping
def test_shaping_gives_its_hand_numbers(name):
  for options, rewards, lengths, expected in hand_numbers.SHAPINGS[name]:
    shaping_fn = shaping.build(name, **options)
    for fn in (shaping_fn, jax.jit(shaping_fn), jax.vmap(shaping_fn)):
      got = fn(f32(rewards), jnp.asarray(lengths, jnp.int32))
      assert got.dtype == jnp.float32
      np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


@each_estimator
def test_estimator_gives_its_hand_numbers(name):
  for reference, target, expected in hand_numbers.ESTIMATORS[name]:
    got = penalties.reference_kl(
        logprobs=hand_numbers.logs(target),
        reference_logprobs=hand_numbers.logs(reference),
        estimator=name,
    )
    np.testing.assert_allclose(got, expected, rtol=2e-5)


# --- normalizers -------------------------------------------------------------


@each_normalizer
def test_normalizer_gives_its_hand_numbers(name):
  for options, mask, expected in hand_numbers.NORMALIZERS[name]:
    normalizer = normalizers.build(name, **options)
    weights = normalizer(jnp.asarray(mask, bool))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(normalizer)(jnp.asarray(mask, bool)), expected, rtol=1e-6
    )


@each_normalizer
def test_normalizer_weighs_a_group_by_itself_in_vmap(name):
  options = hand_numbers.NORMALIZERS[name][0][0]
  normalizer = normalizers.build(name, **options)
  masks = jax.random.bernoulli(jax.random.key(0), 0.6, (3, 4, 5))
  np.testing.assert_allclose(
      jax.vmap(normalizer)(masks),
      jnp.stack([normalizer(mask) for mask in masks]),
      rtol=1e-6,
  )


@each_normalizer
def test_normalizer_counts_alike_what_it_says_it_does(name):
  options = {'horizon': 4, 'group_size': 2}
  known = normalizers.register.required(name)
  normalizer = normalizers.build(name, **{x: options[x] for x in known})
  # Groups of 1 and 3 tokens, and of 2 and none.
  mask = jnp.arange(4)[None] < jnp.asarray([[1], [3], [2], [0]])
  weights = np.asarray(normalizer(mask))
  alike = lambda x: len(np.unique(x[x > 0].round(6))) == 1
  found = [
      what for what, x in
      (('tokens', weights), ('sequences', weights.sum(-1))) if alike(x)
  ]
  assert ''.join(found) == normalizers.counts_alike(name)


@each_normalizer
def test_normalizer_gives_padding_and_empty_rollouts_no_weight(name):
  options = hand_numbers.NORMALIZERS[name][0][0]
  normalizer = normalizers.build(name, **options)
  mask = jnp.asarray([[True, False], [False, False]])
  weights = np.asarray(normalizer(mask))
  assert np.all(np.isfinite(weights))
  assert weights[0, 0] > 0 and np.all(weights[~np.asarray(mask)] == 0)
  empty = jnp.zeros((2, 3), bool)
  np.testing.assert_array_equal(normalizer(empty), np.zeros((2, 3)))
