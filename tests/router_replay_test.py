"""Experts taken while sampling are taken again while learning (R3)."""

import dataclasses
import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import tiny_model

from dppo_jax import diagnostics
from dppo_jax import objective
from dppo_jax import optim
from dppo_jax import packing
from dppo_jax import replay
from dppo_jax import rollout as rollout_lib
from dppo_jax import sampling
from dppo_jax import shaping
from dppo_jax import sharding
from dppo_jax import target
from dppo_jax import train_step
from dppo_jax.checkpoint import Checkpoints
from dppo_jax.models import experts
from dppo_jax.types import ScoredRollout

MODEL = tiny_model.WITH_EXPERTS.replace(config=dataclasses.replace(
    tiny_model.WITH_EXPERTS.config, num_experts=8
))
TOPK_TV = tiny_model.topk_tv()
LAYERS, CHOSEN = 2, 2
SEED = 7  # Sampled in bfloat16, 3 of 88 tokens met other experts.
SAMPLED = tiny_model.PROMPT_LENGTH + tiny_model.COMPLETION_LENGTH - 1  # T


@functools.cache
def params():
  """Random ones whose experts matter: they are as wide as the attention."""
  tree = tiny_model.jit(MODEL.init)(jax.random.key(0))
  tree['embed']['embedding'] *= 20
  kernels = tree['layers']['mlp']['experts']
  kernels['down']['kernel'] *= 8
  return tree


def make_rollout_fn(
    *, record_routing=True, model=MODEL, mesh=None, **options
):
  sampler = sampling.make_sampler(
      model,
      group_size=tiny_model.GROUP_SIZE,
      max_completion_length=tiny_model.COMPLETION_LENGTH,
      eos_ids=tiny_model.EOS_IDS,
      pad_id=tiny_model.PAD_ID,
      temperature=1.0,
      record=TOPK_TV.record,
      record_routing=record_routing,
      **options,
  )
  if mesh is not None:
    sampler = sharding.by_rows(
        sampler, mesh, head_dim=model.config.head_dim
    )
  return rollout_lib.make_rollout_fn(sampler, group_size=tiny_model.GROUP_SIZE)


def scored_of(rollout, mesh=None):
  rewards = jnp.tile(jnp.array([1.0, 0.0, 0.0, 1.0]), tiny_model.NUM_PROMPTS)
  scored = ScoredRollout(rollout, rewards)
  return jax.device_put(scored, mesh and sharding.batch(mesh))


@functools.cache
def sampled(seed=1, num_prompts=tiny_model.NUM_PROMPTS, **options):
  rollout, _ = compiled_rollout(**options)(
      params(),
      tiny_model.prompts(num_prompts),
      jax.random.key(seed),
      jnp.int32(0),
  )
  return rollout


@functools.cache
def compiled_rollout(**options):
  return tiny_model.jit(make_rollout_fn(**options))


logprobs_of = objective.make_logprobs_fn(
    model=MODEL, num_parts=1, temperature=1.0, chunk_size=0
)
logprobs = tiny_model.jit(logprobs_of)


def own_choices(params, rollout):
  """What the routers take, [B, T, L, k]."""
  _, kept = tiny_model.jit(functools.partial(
      MODEL.trunk, routing=experts.Routing(record=True)
  ))(
      params,
      rollout.tokens[:, :-1],
      positions=rollout.positions[:, :-1],
      segment_ids=rollout.segment_ids[:, :-1],
  )
  return np.asarray(kept.routed.choices)


def real(rollout):
  """Tokens that were read to sample another one. [B, T]."""
  return np.asarray(
      (rollout.segment_ids[:, :-1] > 0) & (rollout.segment_ids[:, 1:] > 0)
  )


def test_slots_remember_the_experts_that_rows_side_by_side_do():
  together, slots = sampled(), sampled(num_slots=6, num_halvings=1)
  np.testing.assert_array_equal(slots.tokens, together.tokens)
  read = real(together)
  np.testing.assert_array_equal(slots.routing[read], together.routing[read])
  assert len(np.unique(slots.routing[read])) == 8


def without_routing(rollout):
  return rollout._replace(routing=())


def near(scale=0.05):
  """The policy a few updates later."""
  leaves, structure = jax.tree.flatten(params())
  keys = jax.random.split(jax.random.key(5), len(leaves))
  return structure.unflatten([
      x + scale * jnp.std(x) * jax.random.normal(key, x.shape)
      for x, key in zip(leaves, keys, strict=True)
  ])


# What is recorded.


def test_the_record_holds_the_experts_of_every_token_that_was_read():
  rollout = sampled()
  shape = (tiny_model.NUM_PROMPTS * tiny_model.GROUP_SIZE, SAMPLED)
  assert rollout.routing.shape == (*shape, LAYERS, CHOSEN)
  assert rollout.routing.dtype == jnp.uint8
  # In float32 sampler and learner choose the same: of prompts, too.
  recorded, own = np.asarray(rollout.routing), own_choices(params(), rollout)
  mask = real(rollout)
  assert mask[:, : tiny_model.PROMPT_LENGTH - 1].any()
  np.testing.assert_array_equal(recorded[mask], own[mask])
  assert len(np.unique(recorded[mask])) == MODEL.config.num_experts


def test_a_rollout_without_replay_and_a_dense_model_record_nothing():
  assert sampled(record_routing=False).routing == ()
  scored = tiny_model.make_scored(TOPK_TV)
  assert scored.rollout.routing == ()
  assert sampled().tokens.tolist() == (
      sampled(record_routing=False).tokens.tolist()
  )


def test_many_experts_take_two_bytes():
  assert experts.choice_dtype(256) == jnp.uint8
  assert experts.choice_dtype(257) == jnp.uint16


# What is replayed.


def test_replaying_the_routers_own_choice_changes_nothing():
  rollout = sampled()
  mask = np.asarray(rollout.token_mask)
  np.testing.assert_allclose(
      logprobs(params(), rollout)[mask],
      logprobs(params(), without_routing(rollout))[mask],
      rtol=0, atol=1e-5,
  )


@pytest.mark.parametrize('normalize', [False, True])
def test_weights_are_the_learners_own_over_the_recorded_experts(normalize):
  config = dataclasses.replace(
      MODEL.config, num_experts=4, hidden_size=4, norm_topk_prob=normalize
  )
  router = experts.Router(config, rngs=nnx.Rngs(0))
  router.kernel[...] = jnp.eye(4)  # The token is its own logits.
  x = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
  choices, weights, routed = router(
      x, experts.Routing(replay=jnp.array([[0, 1]], jnp.uint8))
  )
  assert choices.tolist() == [[0, 1]]
  # Its own choice is 1 and 3: 0.1 and 0.4 of 1, or of 0.5.
  expected = [0.2, 0.8] if normalize else [0.1, 0.4]
  np.testing.assert_allclose(weights[0], expected, rtol=1e-6)
  assert routed.changed.tolist() == [0.5]


def test_the_router_learns_through_the_weights_of_replayed_experts():
  rollout = sampled()

  def loss(tree):
    return jnp.sum(
        jnp.where(rollout.token_mask, logprobs_of(tree, rollout), 0.0)
    )

  gradient = tiny_model.jit(jax.grad(loss))(near())
  assert jnp.abs(gradient['layers']['mlp']['router']['kernel']).max() > 1e-3


def gap(params, rollout):
  """Mean |pi - mu| of sampled tokens, the mismatch of the paper's figures."""
  pi = jnp.exp(logprobs(params, rollout))
  mu = jnp.exp(rollout.behaviour_logprobs)
  return float(jnp.mean(jnp.abs(pi - mu), where=rollout.token_mask))


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_replay_makes_the_mismatch_of_a_bfloat16_sampler_smaller(seed):
  rollout = sampled(seed=seed, num_prompts=64, dtype='bfloat16')
  mask = real(rollout)
  recorded, own = np.asarray(rollout.routing), own_choices(params(), rollout)
  assert (np.sort(recorded[mask]) != np.sort(own[mask])).any()
  replayed = gap(params(), rollout)
  free = gap(params(), without_routing(rollout))
  # 0.0034 to 0.0038 and 0.0062 to 0.0081 were measured.
  assert 0 < replayed < 0.75 * free


def test_packed_rows_are_replayed_as_the_rows_that_were_sampled():
  rollout = sampled(seed=SEED, dtype='bfloat16')
  in_packed_rows = tiny_model.jit(objective.make_logprobs_fn(
      model=MODEL, num_parts=2, temperature=1.0, chunk_size=0,
      arrange=packing.make_packed(
          row_length=30, prompt_length=tiny_model.PROMPT_LENGTH,
          group_size=tiny_model.GROUP_SIZE,
      ),
  ))
  mask = np.asarray(rollout.token_mask)
  alone = np.asarray(logprobs(params(), rollout))[mask]
  packed = np.asarray(in_packed_rows(params(), rollout))[mask]
  np.testing.assert_allclose(packed, alone, rtol=0, atol=1e-5)
  # The learner's own choice is another one for some.
  own = np.asarray(logprobs(params(), without_routing(rollout)))[mask]
  assert np.abs(own - alone).max() > 1e-3


# In the learner.


def one_update(rollout, *, extras=None, **options):
  learn = tiny_model.make_learner(
      TOPK_TV, model=MODEL, extras=extras or objective.Extras(), **options
  )
  state = tiny_model.make_state(
      params(), with_reference=bool(extras and extras.needs_reference)
  )
  return tiny_model.jit(learn)(
      state, scored_of(rollout), jax.random.key(3)
  )


@pytest.mark.parametrize('anchor', ['behaviour', 'recomputed'])
def test_both_anchors_are_those_of_the_replayed_experts(anchor):
  # Before the first update the recomputed anchor is the policy itself: only
  # if both are replayed alike is there no divergence.
  rollout = sampled(seed=SEED, dtype='bfloat16')
  _, stats, _ = one_update(rollout, anchor=anchor)
  mask = np.asarray(stats.token_mask)
  divergence = np.asarray(stats.divergence)[mask]
  if anchor == 'recomputed':
    assert divergence.max() < 1e-5
  else:
    assert divergence.max() > 1e-4
  _, free, _ = one_update(without_routing(rollout), anchor='behaviour')
  if anchor == 'behaviour':
    assert divergence.mean() < np.asarray(free.divergence)[mask].mean()


def vocabulary(params, rollout, *, replay):
  """Log-probabilities of all tokens, [B, T, V], in float64."""

  @tiny_model.jit
  def logits(params, replay):
    hidden, _ = MODEL.trunk(
        params,
        rollout.tokens[:, :-1],
        positions=rollout.positions[:, :-1],
        segment_ids=rollout.segment_ids[:, :-1],
        routing=experts.Routing(replay=replay),
    )
    return MODEL.head(params, hidden)

  x = np.asarray(logits(params, replay), np.float64)
  return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


@pytest.mark.parametrize('estimator', ['k1', 'full'])
def test_the_kl_is_to_a_reference_that_takes_its_own_experts(estimator):
  rollout = sampled(seed=SEED, dtype='bfloat16')
  state = tiny_model.make_state(params())._replace(reference=near())

  def run(coefficient):
    extras = objective.Extras(
        kl_coefficient=coefficient, kl_estimator=estimator
    )
    prepare, weighted_loss = tiny_model.make_objective(
        TOPK_TV, model=MODEL, extras=extras
    )

    @tiny_model.jit
    def fn(state):
      batch = prepare(state, scored_of(rollout))
      loss, _ = weighted_loss(
          state.params, batch, state.reference, state.policy_version
      )
      return loss, batch.reference_logprobs

    return fn(state)

  (loss, reference_logprobs), (without, _) = run(1.0), run(0.0)
  mask = np.asarray(rollout.token_mask)
  targets = np.asarray(rollout.tokens)[:, 1:, None]
  of_targets = lambda x: np.take_along_axis(x, targets, -1)[..., 0]
  policy = vocabulary(params(), rollout, replay=rollout.routing)

  def kl(reference):
    """Mean over the tokens, as token_mean weighs them."""
    each = of_targets(policy - reference)
    if estimator == 'full':
      each = np.sum(np.exp(policy) * (policy - reference), axis=-1)
    return np.mean(each[mask])

  own, replayed = (
      vocabulary(near(), rollout, replay=replay)
      for replay in (None, rollout.routing)
  )
  assert abs(kl(own) - kl(replayed)) > 1e-3  # It can be told.
  np.testing.assert_allclose(loss - without, kl(own), rtol=0, atol=1e-5)
  if estimator != 'full':
    np.testing.assert_allclose(
        reference_logprobs[mask], of_targets(own)[mask], rtol=0, atol=1e-5
    )


def test_disagreement_is_counted_by_token_and_layer():
  rollout = sampled(seed=SEED, dtype='bfloat16')
  _, stats, _ = one_update(rollout, num_microbatches=2)
  recorded = np.asarray(rollout.routing)
  changed, changed_sets = (
      np.asarray(x) for x in (stats.router.changed, stats.router.changed_sets)
  )
  mask = np.asarray(stats.token_mask)
  assert 0 < changed[mask].mean() < changed_sets[mask].mean() < 1
  metrics = tiny_model.jit(
      functools.partial(diagnostics.token_metrics, threshold=0.2)
  )(stats)
  np.testing.assert_allclose(
      metrics['router/changed_sets'], changed_sets[mask].mean(), rtol=1e-5
  )
  # In the first layer routers see the same: by hand from its own choices.
  _, kept = tiny_model.jit(functools.partial(
      MODEL.trunk, routing=experts.Routing(replay=rollout.routing)
  ))(
      params(),
      rollout.tokens[:, :-1],
      positions=rollout.positions[:, :-1],
      segment_ids=rollout.segment_ids[:, :-1],
  )
  own = own_choices(params(), rollout)[:, :, 0]
  share = np.array([
      1 - len(set(a) & set(b)) / CHOSEN
      for a, b in zip(
          own.reshape(-1, CHOSEN), recorded[:, :, 0].reshape(-1, CHOSEN)
      )
  ])
  np.testing.assert_array_equal(
      np.asarray(kept.routed.changed[:, :, 0]).ravel(), share
  )


def test_a_dense_models_metrics_know_no_router():
  scored = tiny_model.make_scored(TOPK_TV)
  _, stats, _ = tiny_model.jit(tiny_model.make_learner(TOPK_TV))(
      tiny_model.make_state(tiny_model.params()), scored, jax.random.key(0)
  )
  assert stats.router == ((), (), ())


# Balance.


def test_balance_by_hand():
  # 3 experts, 1 of a token; the last token does not count.
  probs = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.0, 0.0, 1.0]])
  choices = jnp.array([[0], [1], [2]])
  counted = jnp.array([True, True, False])
  # f = 1/2, 1/2, 0; P = 0.3, 0.45, 0.25: 3 * (0.15 + 0.225).
  actual = experts.balance_loss(probs=probs, choices=choices, counted=counted)
  assert actual == pytest.approx(3 * 0.375)
  nothing = experts.balance_loss(
      probs=probs, choices=choices, counted=jnp.zeros(3, bool)
  )
  assert nothing == 0


def test_balance_is_k_where_all_experts_are_used_alike():
  probs = jnp.full((4, 4), 0.25)
  choices = jnp.array([[0, 1], [1, 2], [2, 3], [3, 0]])
  actual = experts.balance_loss(
      probs=probs, choices=choices, counted=jnp.ones(4, bool)
  )
  assert actual == pytest.approx(2)


def test_the_coefficient_adds_the_gradient_of_the_balance():
  rollout = without_routing(sampled())
  coefficient = 0.5

  def balance(tree):
    _, routed = target.hidden_states(
        MODEL, tree, packing.rows_of(rollout), counted=rollout.token_mask
    )
    return jnp.mean(routed.balance)

  plain, _, _ = one_update(rollout)
  balanced, stats, _ = one_update(
      rollout, extras=objective.Extras(router_balance=coefficient)
  )
  expected, gradient = tiny_model.jit(jax.value_and_grad(balance))(params())
  np.testing.assert_allclose(stats.router.balance, expected, rtol=1e-5)
  step = tiny_model.sgd().schedule(0)
  change = jax.tree.map(jnp.subtract, balanced.params, plain.params)
  tiny_model.assert_trees_close(
      change,
      jax.tree.map(lambda g: -step * coefficient * g, gradient),
      rtol=0, atol=1e-5,
  )


# In the whole step.


def make_step(mesh, *, with_buffer, dtype='bfloat16', num_minibatches=1):
  optimizer = optim.build('adamw', total_updates=9, learning_rate=0.01)
  rollout_fn = make_rollout_fn(dtype=dtype, mesh=mesh)
  start = train_step.init_state(
      jax.tree.map(jnp.copy, params()), optimizer, jax.random.key(0)
  )
  buffer = None
  if with_buffer:
    buffer = replay.make_replay(
        capacity=2, num_groups=tiny_model.NUM_PROMPTS, sampling='uniform',
        group_size=tiny_model.GROUP_SIZE, max_age=32, num_updates=1,
        logprobs_fn=None, shaping_fn=shaping.build('unshaped'),
    )
    start = start._replace(replay=buffer.init(
        train_step.blank(rollout_fn, start, tiny_model.prompts())
    ))
  shardings = train_step.state_shardings(start, mesh)
  step = train_step.make_train_step(
      learn=tiny_model.make_learner(
          TOPK_TV, model=MODEL, optimizer=optimizer,
          num_minibatches=num_minibatches,
      ),
      rollout_fn=rollout_fn,
      threshold=TOPK_TV.threshold,
      group_size=tiny_model.GROUP_SIZE,
      vocab_size=MODEL.config.vocab_size,
      state_shardings=shardings,
      mesh=mesh,
      replay=buffer,
  )
  state = jax.device_put(start, shardings)
  blank = train_step.blank(rollout_fn, state, tiny_model.prompts())
  return step, state, jax.device_put(blank, sharding.batch(mesh))


def test_routing_goes_through_step_buffer_and_checkpoint(tmp_path):
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
  with tiny_model.quick_compilation():
    step, state, pending = make_step(mesh, with_buffer=True)
    state, rollout, _ = step(state, pending, tiny_model.prompts())
    state, rollout, _ = step(
        state, scored_of(rollout, mesh), tiny_model.prompts()
    )
    held = state.replay.scored.rollout.routing
    assert held.shape[:2] == (2, rollout.routing.shape[0])
    arrays = {'state': state, 'pending': scored_of(rollout, mesh)}
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(2, arrays, {})
      checkpoints.wait()
      _, restored, _ = checkpoints.restore_latest(arrays)
    tiny_model.assert_trees_equal(restored, arrays)
    assert restored['pending'].rollout.routing.dtype == jnp.uint8
    _, _, metrics = step(
        restored['state'], restored['pending'], tiny_model.prompts()
    )
  assert metrics['replay/groups'] > 0
  assert 0 < metrics['router/changed_experts'] < 1
  assert step._cache_size() == 1


ONE_STEP = """
    import json, sys
    import jax, numpy as np
    import router_replay_test as test, tiny_model
    from dppo_jax import sharding

    sizes = {axis: 1 for axis in sharding.AXES} | json.loads(sys.argv[1])
    mesh = sharding.make_mesh(**sizes)
    # In float32, so that no router changes its mind by rounding; in two
    # updates, so that the second finds routers that have moved.
    step, state, pending = test.make_step(
        mesh, with_buffer=False, dtype='float32', num_minibatches=2
    )
    state, rollout, _ = step(state, pending, tiny_model.prompts())
    scored = test.scored_of(rollout, mesh)
    _, _, metrics = step(state, scored, tiny_model.prompts())
    routing = rollout.routing
    print(json.dumps({
        'tokens': np.asarray(rollout.tokens).tolist(),
        'routing': np.asarray(routing).tolist(),
        'rows': routing.addressable_shards[0].data.shape[0],
        'metrics': {name: float(metrics[name]) for name in (
            'router/changed_sets', 'router/changed_experts', 'loss',
            'mismatch/prob_gap_mean')},
    }))
"""


def run_on(num_devices, mesh):
  printed = many_devices.run(
      ONE_STEP, json.dumps(mesh), num_devices=num_devices, optimized=False
  )
  return json.loads(printed[-1])


@pytest.mark.several_devices
@pytest.mark.slow
def test_eight_devices_replay_what_one_does():
  expected = run_on(1, {})
  actual = run_on(8, {'fsdp': 2, 'tensor': 2, 'expert': 2})
  assert (expected['rows'], actual['rows']) == (16, 8)
  assert actual['tokens'] == expected['tokens']
  assert actual['routing'] == expected['routing']
  for name, value in expected['metrics'].items():
    # Adam's first step has the size of the rate, however small a gradient.
    assert actual['metrics'][name] == pytest.approx(value, rel=1e-2, abs=1e-5)
  assert expected['metrics']['router/changed_sets'] > 0
