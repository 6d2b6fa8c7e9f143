"""Other rows: nothing is lost, nothing mixes, and the learner learns the same.

B sequences in groups of G, T slots of a row as sampled, P prompt tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from dppo_jax import divergences
from dppo_jax import objective
from dppo_jax import packing
from dppo_jax import rollout as rollout_lib
from dppo_jax import sampling
from dppo_jax import target
from dppo_jax import train_step
from dppo_jax.models import attention
from dppo_jax.types import ScoredRollout

P, C, G = tiny_model.PROMPT_LENGTH, tiny_model.COMPLETION_LENGTH, 4
T = P + C - 1


def make_rollout(lengths, prompt_lengths):
  """A rollout of random tokens; a length for each row and for each group."""
  rng = np.random.RandomState(0)
  num_groups = len(prompt_lengths)
  assert len(lengths) == num_groups * G
  mask = np.arange(P) >= P - np.asarray(prompt_lengths)[:, None]
  prompts = tiny_model.Prompts(
      np.where(mask, rng.randint(9, 64, mask.shape), 0).astype(np.int32), mask
  )
  sampled = np.arange(C) < np.asarray(lengths)[:, None]
  tokens = np.where(sampled, rng.randint(9, 64, sampled.shape), 0)
  logprobs = np.where(sampled, -rng.exponential(size=sampled.shape), 0)
  return rollout_lib.assemble(
      prompts,
      sampling.Completions(
          tokens=jnp.asarray(tokens, jnp.int32),
          mask=jnp.asarray(sampled),
          logprobs=jnp.asarray(logprobs, jnp.float32),
          record=(),
          truncated=jnp.zeros(len(lengths), bool),
          num_steps=jnp.int32(C),
      ),
      group_size=G,
  )


@functools.cache
def compiled_arrange(row_length, **options):
  return jax.jit(
      packing.make_packed(
          row_length=row_length, prompt_length=P, group_size=G, **options
      ),
      static_argnums=2,
  )


def arrange(rows, chosen, num_parts, *, row_length, **options):
  layout = compiled_arrange(row_length, **options)(
      rows, jnp.asarray(chosen, jnp.int32), num_parts
  )
  return layout._replace(
      num_parts=int(layout.num_parts),
      lengths=tuple(int(x) for x in layout.lengths),
  )


def sequences(layout):
  """(row, slots, source, segment, continued) of each segment of each row."""
  source, segments, continued = (
      np.asarray(x).reshape(-1, x.shape[-1])
      for x in (layout.source, layout.segments, layout.prompt_segments)
  )
  for row, ids in enumerate(segments):
    for segment in sorted(set(ids) - {0}):
      slots = np.flatnonzero(ids == segment)
      [before] = set(continued[row, slots])
      yield row, slots, source[row, slots], segment, before


def check(rollout, chosen, row_length, num_parts=1, **options):
  """Everything that must hold of a layout; returns it and its used rows."""
  rows = packing.rows_of(rollout)
  layout = arrange(rows, chosen, num_parts, row_length=row_length, **options)
  shape = rows.token_mask.shape
  where = {}  # (row, segment) -> the prompt that it holds, as a tuple.
  seen, of_row = [], {}
  empty = np.asarray(layout.segments) == 0
  assert (np.asarray(layout.source)[empty] == shape[0] * T).all()
  assert not np.asarray(layout.prompt_segments)[empty].any()
  assert (np.diff(empty.astype(int)) >= 0).all()  # Behind what there is.
  for row, slots, source, segment, before in sequences(layout):
    assert (np.diff(slots) == 1).all() and (np.diff(source) == 1).all()
    index, columns = source[0] // T, source % T
    assert (source // T == index).all()
    tokens = tuple(np.asarray(rows.inputs)[index, columns])
    if before == 0 and not rows.token_mask[index, columns[0]]:
      assert not rows.token_mask[index, columns].any()
      assert columns[-1] == P - 2 and 0 not in tokens
      where[row, segment] = (index // G, tokens)
      continue
    # A completion, from the slot that reads the last token of the prompt on.
    assert columns[0] == P - 1
    assert len(columns) == np.asarray(rows.token_mask)[index].sum()
    seen.append(index)
    prompt = np.asarray(rows.inputs)[index, : P - 1]
    prompt = tuple(prompt[np.asarray(rows.input_segments)[index, : P - 1] > 0])
    if prompt:
      assert where[row, before] == (index // G, prompt)
    else:
      assert before == 0
    # Between it and its prompt stand completions of that prompt only.
    if before:
      segments, continued = (
          np.asarray(x).reshape(-1, row_length)[row]
          for x in (layout.segments, layout.prompt_segments)
      )
      of_group = (segments == before) | (continued == before)
      assert of_group[before - 1 : slots[0]].all()
    of_row.setdefault(row, []).append(index)
  sizes = np.asarray(rows.token_mask).sum(1)
  assert sorted(seen) == sorted(i for i in chosen if sizes[i])
  # One copy of a prompt in a row.
  for row, indices in of_row.items():
    copies = [group for (r, _), (group, _) in where.items() if r == row]
    assert len(copies) == len(set(copies)) <= len({i // G for i in indices})
  used = len(of_row)
  assert sorted(of_row) == list(range(used))
  part = layout.source.shape[1]
  assert layout.num_parts == -(-used // part) <= num_parts
  return layout, used


def random_rollout(seed, num_groups=6):
  rng = np.random.RandomState(seed)
  lengths = np.minimum(rng.geometric(0.4, num_groups * G) - 1, C)
  return make_rollout(lengths, rng.randint(1, P + 1, num_groups))


@pytest.mark.parametrize('row_length', [T, T + 3, 2 * T, 5 * T + 1])
@pytest.mark.parametrize('num_parts', [1, 3])
def test_every_completion_is_in_one_row_behind_its_prompt(
    row_length, num_parts
):
  rng = np.random.RandomState(0)
  for seed in range(8):
    rollout = random_rollout(seed)
    chosen = rng.permutation(6 * G)[: rng.choice([6 * G, 3 * G])]
    check(rollout, chosen, row_length, num_parts)


def test_rows_of_a_part_are_a_multiple_of_the_shards():
  layout, _ = check(
      random_rollout(0), np.arange(24), 2 * T, num_parts=3, row_multiple=4
  )
  # 24 sequences, two of the longest in a row: 12 rows at most.
  assert layout.source.shape == (3, 4, 2 * T)


def test_the_longest_completions_fill_what_was_reserved():
  layout, used = check(
      make_rollout([C] * 24, [P] * 6), np.arange(24), T, num_parts=6
  )
  # A prompt of P - 1 slots and C more: nothing shares a row.
  assert used == 24 and layout.num_parts == 6


def test_a_hand_example():
  # Prompts of 5 and 3 tokens read 4 and 2 slots before the completions. Rows
  # of 12: group 0 has 4 + (4 + 3 + 1) = 12 slots; one of 0 tokens is nowhere.
  # Group 1 has 2 + (2 + 2 + 1 + 1) = 8.
  rollout = make_rollout([3, 4, 0, 1, 2, 1, 2, 1], [5, 3])
  layout, used = check(rollout, np.arange(8), 12)
  assert used == 2
  source = np.asarray(layout.source[0])
  row = lambda b, first, last: [b * T + t for t in range(first, last)]
  np.testing.assert_array_equal(
      source[0], row(1, 0, 4) + row(1, 4, 8) + row(0, 4, 7) + row(3, 4, 5)
  )
  np.testing.assert_array_equal(
      source[1],
      row(4, 2, 4) + row(4, 4, 6) + row(6, 4, 6) + row(5, 4, 5) + row(7, 4, 5)
      + [8 * T] * 4,
  )
  np.testing.assert_array_equal(
      layout.segments[0, 0], [1] * 4 + [5] * 4 + [9] * 3 + [12]
  )
  np.testing.assert_array_equal(
      layout.prompt_segments[0, 0], [0] * 4 + [1] * 8
  )


def test_nothing_sampled_makes_no_parts():
  layout, used = check(make_rollout([0] * 8, [5, 1]), np.arange(8), 2 * T)
  assert used == 0 and layout.num_parts == 0


@pytest.mark.parametrize('num_halvings, halving_steps, allowed', [
    (0, 1, [40]),
    (1, 1, [40, 20]),
    (3, 1, [40, 20, 10, 5]),
    (2, 2, [40, 30, 20, 15, 10]),
])
def test_a_part_is_as_short_as_the_fullest_of_its_rows_allows(
    num_halvings, halving_steps, allowed
):
  row_length, seen = 4 * T, set()
  for seed in range(8):
    num_parts = (3, 6)[seed % 2]  # Of two rows, or of one.
    layout, _ = check(
        random_rollout(seed), np.arange(24), row_length, num_parts,
        num_halvings=num_halvings, halving_steps=halving_steps,
    )
    num_rows = layout.source.shape[1]
    total, computed = packing.over_parts(
        lambda part, length, rows=num_rows: (
            jnp.int32(length), jnp.ones((rows, length), bool)
        ),
        layout, jnp.int32(0),
    )
    expected = np.zeros(num_parts, int)
    for part in range(layout.num_parts):
      filled = np.flatnonzero(np.asarray(layout.segments[part]).any(0))
      expected[part] = min(x for x in allowed if x > filled[-1])
    np.testing.assert_array_equal(
        computed,
        np.broadcast_to(
            np.arange(row_length) < expected[:, None, None], computed.shape
        ),
    )
    assert total == expected.sum()
    assert packing.num_slots(layout) == computed.sum()
    seen |= set(expected) - {0}
  assert (min(seen) < row_length) == (num_halvings > 0)


def test_a_row_that_is_too_short_is_refused():
  rows = packing.rows_of(random_rollout(0))
  with pytest.raises(ValueError, match=(
      f'row_length={T - 1} is shorter than a prompt and its completion, '
      f'{T} slots; use at least {T}'
  )):
    arrange(rows, np.arange(24), 1, row_length=T - 1)


def test_what_was_taken_can_be_put_back():
  rows = packing.rows_of(random_rollout(1))
  mask = np.asarray(rows.token_mask)
  values = {
      'a': jnp.asarray(np.random.RandomState(0).normal(size=mask.shape)),
      'b': jnp.arange(mask.size * 2).reshape(*mask.shape, 2),
  }
  layout = arrange(rows, np.arange(24), 3, row_length=2 * T)
  parts = [packing.take(layout, i, rows, values)[1] for i in range(3)]
  back = packing.put_back(
      layout, jax.tree.map(lambda *x: jnp.stack(x), *parts), rows.token_mask
  )
  for name, x in back.items():
    np.testing.assert_array_equal(x[mask], values[name][mask])


# The model and the learner.

SLIDING = tiny_model.MODEL.replace(
    config=dataclasses.replace(
        tiny_model.CONFIG, sliding_window=3,
        layer_types=('sliding_attention', 'full_attention'),
    )
)


@pytest.mark.parametrize('model', [
    tiny_model.MODEL, SLIDING, tiny_model.WITH_EXPERTS
], ids=['full', 'sliding', 'experts'])
def test_hidden_states_are_those_of_the_rows_as_sampled(model):
  params = tiny_model.jit(model.init)(jax.random.key(0))
  rows = packing.rows_of(random_rollout(2))
  layout = arrange(rows, np.arange(24), 1, row_length=3 * T)
  run = tiny_model.jit(lambda rows: target.hidden_states(model, params, rows))
  expected, _ = run(rows)
  [packed] = packing.take(layout, 0, rows)
  hidden, _ = run(packed)
  back = packing.put_back(layout, hidden[None], rows.token_mask)
  mask = np.asarray(rows.token_mask)
  assert np.abs(expected[mask]).max() > 0.1
  np.testing.assert_allclose(back[mask], expected[mask], rtol=0, atol=2e-5)


GROUPS = attention.Groups(P - 1, G)
grouped = packing.make_grouped(prompt_length=P, group_size=G)
# By XLA: two products merged, or the rows that they stand for.
GROUPED = {
    'merged': attention.in_merged_groups(GROUPS),
    'repeated': attention.in_groups(attention.in_xla(), GROUPS),
}


def test_grouped_rows_hold_each_prompt_once_and_every_completion():
  lengths = [C, 1, 0, 3] * 2
  prompt_lengths = [P, 2]
  rollout = make_rollout(lengths, prompt_lengths)
  rows = packing.rows_of(rollout)
  # The second group first.
  chosen = np.array([4, 5, 6, 7, 0, 1, 2, 3])
  layout = grouped(rows, jnp.asarray(chosen), 2)
  assert layout.source.shape == (2, 1, P - 1 + G * C)
  for part, group in enumerate((1, 0)):
    [taken] = packing.take(layout, part, rows)
    real = prompt_lengths[group] - 1
    segments = np.asarray(taken.input_segments[0])
    prompt, own = segments[: P - 1], segments[P - 1 :].reshape(G, C)
    np.testing.assert_array_equal(prompt, np.arange(P - 1) >= P - 1 - real)
    inputs = np.asarray(taken.inputs[0])
    of_group = slice(group * G, (group + 1) * G)
    np.testing.assert_array_equal(
        inputs[: P - 1], np.asarray(rollout.tokens)[group * G, : P - 1]
    )
    np.testing.assert_array_equal(
        inputs[P - 1 :].reshape(G, C),
        np.asarray(rollout.tokens)[of_group, P - 1 : -1],
    )
    np.testing.assert_array_equal(
        np.asarray(taken.token_mask[0])[P - 1 :].reshape(G, C),
        np.asarray(rollout.token_mask)[of_group, P - 1 :],
    )
    for index in range(G):
      # A slot that reads a token of it, the prompt's last one included.
      reads = np.asarray(rollout.segment_ids)[group * G + index, P - 1 : -1] > 0
      np.testing.assert_array_equal(own[index], np.where(reads, index + 2, 0))
    np.testing.assert_array_equal(
        taken.prompt_segments[0], np.where(segments > 1, 1, 0)
    )


@pytest.mark.parametrize('name', GROUPED)
@pytest.mark.parametrize('model', [
    tiny_model.MODEL, SLIDING, tiny_model.WITH_EXPERTS
], ids=['full', 'sliding', 'experts'])
def test_hidden_states_of_grouped_rows_are_those_as_sampled(model, name):
  params = tiny_model.jit(model.init)(jax.random.key(0))
  rows = packing.rows_of(random_rollout(2))
  layout = grouped(rows, jnp.arange(24), 1)
  sharing = model.replace(row_attention=GROUPED[name])
  run = lambda model: tiny_model.jit(
      lambda rows: target.hidden_states(model, params, rows)[0]
  )
  expected = run(model)(rows)
  [taken] = packing.take(layout, 0, rows)
  hidden = run(sharing)(taken)
  back = packing.put_back(layout, hidden[None], rows.token_mask)
  mask = np.asarray(rows.token_mask)
  assert np.abs(expected[mask]).max() > 0.1
  np.testing.assert_allclose(back[mask], expected[mask], rtol=0, atol=2e-5)


TOPK_TV = tiny_model.topk_tv()


@pytest.fixture(scope='module')
def scored():
  return tiny_model.make_scored(TOPK_TV)


def learn(scored, *, packed=0, shared='', **options):
  if shared:
    options |= {
        'arrange': grouped,
        'rows_together': G,
        'model': tiny_model.MODEL.replace(row_attention=GROUPED[shared]),
    }
  if packed:
    options['arrange'] = packing.make_packed(
        row_length=packed, prompt_length=P, group_size=G
    )
  options = {'num_minibatches': 2, 'num_microbatches': 4, **options}
  with_reference = options.get('extras', objective.Extras()).needs_reference
  state = tiny_model.make_state(
      tiny_model.params(), with_reference=with_reference
  )
  learn_fn = tiny_model.jit(tiny_model.make_learner(TOPK_TV, **options))
  return learn_fn(state, scored, jax.random.key(7))


OPTIONS = [
    {},
    {'chunk_size': 8},
    {'anchor': 'recomputed'},
    {'extras': objective.Extras(kl_coefficient=0.1)},
    {'extras': objective.Extras(kl_coefficient=0.1, kl_where='reward')},
    {'drop_groups_without_spread': True, 'num_groups': 2},
    {'mask_truncated': True},
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_updates_of_packed_rows_are_those_of_the_rows_as_sampled(
    scored, options
):
  check_learning(scored, options, packed=2 * T)


@pytest.mark.parametrize('shared', GROUPED)
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_updates_of_grouped_rows_are_those_of_the_rows_as_sampled(
    scored, options, shared
):
  # In one mini-batch, as several would hold other rows.
  options = options | {'num_minibatches': 1, 'num_microbatches': 2}
  check_learning(scored, options, shared=shared)


def check_learning(scored, options, **layout):
  """Rows of a layout teach what those as sampled do."""
  if 'num_groups' in options:  # Two groups teach nothing.
    scored = scored._replace(rewards=scored.rewards.at[:8].set(1.0))
  expected, stats, metrics = learn(scored, **options)
  state, other_stats, other_metrics = learn(scored, **layout, **options)
  moved = max(jax.tree.leaves(jax.tree.map(
      lambda a, b: jnp.abs(a - b).max(), expected.params, tiny_model.params()
  )))
  assert moved > 1e-3
  # A penalty moves them by more than they are.
  tiny_model.assert_trees_close(
      state.params, expected.params, rtol=0, atol=1e-5 * max(float(moved), 1)
  )
  for name, value in metrics.items():
    if not name.startswith('learner/'):
      np.testing.assert_allclose(
          other_metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name
      )
  # The same tokens in each update.
  for u in range(len(stats.token_mask)):
    tokens = lambda s, u=u: np.sort(
        np.asarray(s.behaviour_logprobs[u])[np.asarray(s.token_mask[u])]
    )
    np.testing.assert_array_equal(tokens(other_stats), tokens(stats))


def test_the_number_of_parts_follows_the_tokens_without_recompilation(scored):
  learn_fn = tiny_model.jit(tiny_model.make_learner(
      TOPK_TV,
      num_microbatches=8,
      arrange=packing.make_packed(
          row_length=2 * T, prompt_length=P, group_size=G
      ),
  ))
  state = tiny_model.make_state(tiny_model.params())
  parts, shares = [], []
  for longest in (0, 1, 3, C):
    mask = np.asarray(scored.rollout.token_mask)
    mask = mask & (np.arange(T) < P - 1 + longest)
    rollout = scored.rollout._replace(token_mask=jnp.asarray(mask))
    new, stats, metrics = learn_fn(
        state, scored._replace(rollout=rollout), jax.random.key(7)
    )
    assert int(np.sum(stats.token_mask)) == mask.sum()
    assert jnp.isfinite(metrics['loss']).all()
    parts.append(int(metrics['learner/microbatches'][0]))
    shares.append(float(metrics['learner/sampled_share'][0]))
  assert parts[0] == 0 and parts == sorted(parts)
  assert 0 < parts[1] < parts[3] < 8
  assert shares[0] == 0 and 0 < shares[1] < shares[3] < 1
  assert learn_fn._cache_size() == 1


# Tokens of each completion of a group with a prompt of one token, which takes
# no slot; and slots computed of rows of 4 * T = 40, by the number of halvings.
HALVED = {
    'nothing': ([0, 0, 0, 0], (0, 0, 0)),
    'two tokens': ([0, 2, 0, 0], (40, 20, 10)),
    'just a quarter': ([4, 4, 1, 1], (40, 20, 10)),
    'one token more': ([4, 4, 1, 2], (40, 20, 20)),
    'just a half': ([6, 6, 6, 2], (40, 20, 20)),
    'and one token': ([6, 6, 6, 3], (40, 40, 40)),
}


@pytest.mark.parametrize('options', [
    {'chunk_size': 8}, {'anchor': 'recomputed'}
], ids=str)
def test_halved_rows_learn_the_same_from_fewer_slots(options):
  def make(num_halvings):
    return tiny_model.jit(tiny_model.make_learner(
        divergences.build('binary_tv'),
        num_microbatches=4,
        arrange=packing.make_packed(
            row_length=4 * T, prompt_length=P, group_size=G,
            num_halvings=num_halvings,
        ),
        **options,
    ))

  whole, *halved = learners = [make(i) for i in range(3)]
  state = tiny_model.make_state(tiny_model.params())
  # Two groups, so that a part can be full and the next one nearly empty.
  rest = [[0] * G, [C] * G]
  cases = [
      (lengths + others, slots)
      for lengths, slots in HALVED.values() for others in rest
  ]
  shares = []
  for lengths, slots in cases:
    rollout = make_rollout(lengths, [1, P])
    # All that a binary divergence remembers.
    rollout = rollout._replace(record=rollout.behaviour_logprobs)
    scored = ScoredRollout(rollout, jnp.tile(jnp.array([1.0, 0, 0, 1]), 2))
    learn_from = lambda fn, scored=scored: fn(
        state, scored, jax.random.key(7)
    )
    expected, stats, metrics = learn_from(whole)
    share = [metrics.pop('learner/sampled_share')[0]]
    mask = np.asarray(stats.token_mask)
    sampled = lambda tree, mask=mask: jax.tree.map(lambda x: x[mask], tree)
    assert mask.sum() == sum(lengths)
    for fn in halved:
      new, other_stats, other_metrics = learn_from(fn)
      share.append(other_metrics.pop('learner/sampled_share')[0])
      tiny_model.assert_trees_close(
          new.params, expected.params, rtol=0, atol=2e-6
      )
      tiny_model.assert_trees_close(
          other_metrics, metrics, rtol=1e-5, atol=1e-6
      )
      np.testing.assert_array_equal(other_stats.token_mask, mask)
      tiny_model.assert_trees_close(
          sampled(other_stats), sampled(stats), rtol=1e-5, atol=1e-5
      )
    if not any(lengths[G:]) and any(lengths):
      np.testing.assert_allclose(share, sum(lengths) / np.array(slots))
    shares.append(share)
  assert all(fn._cache_size() == 1 for fn in learners)
  assert (np.diff(shares) >= 0).all() and np.diff(shares).any(0).all()


def test_the_balance_of_experts_is_the_mean_of_the_parts_that_ran():
  model = tiny_model.WITH_EXPERTS
  params = tiny_model.jit(model.init)(jax.random.key(0))
  divergence = divergences.build('none')
  rollout = random_rollout(3, num_groups=4)
  scored = ScoredRollout(rollout, jnp.zeros(16))  # No spread: balance alone.

  def loss(**options):
    learn_fn = tiny_model.jit(tiny_model.make_learner(
        divergence, model=model, extras=objective.Extras(router_balance=1.0),
        **options,
    ))
    state = tiny_model.make_state(params)
    _, stats, metrics = learn_fn(state, scored, jax.random.key(0))
    seen = np.asarray(stats.router.balance)[np.asarray(stats.token_mask)]
    return float(metrics['loss'][0]), seen, metrics

  expected, balances, _ = loss()
  np.testing.assert_allclose(balances, expected, rtol=1e-5)
  whole = packing.make_packed(row_length=2 * T, prompt_length=P, group_size=G)
  # The same tokens, in one part and in several.
  np.testing.assert_allclose(loss(arrange=whole)[0], expected, rtol=1e-4)
  several, balances, metrics = loss(arrange=whole, num_microbatches=8)
  parts = int(metrics['learner/microbatches'][0])
  assert 1 < parts < 8
  distinct = np.unique(balances.round(5))
  assert len(distinct) == parts
  np.testing.assert_allclose(several, distinct.mean(), rtol=1e-3)


def test_a_mini_batch_of_grouped_rows_consists_of_whole_groups(scored):
  _, stats, _ = learn(
      scored, shared='merged', num_minibatches=2, num_microbatches=1,
      num_epochs=2,
  )
  logprobs = np.asarray(scored.rollout.behaviour_logprobs)
  mask = np.asarray(scored.rollout.token_mask)
  num_groups = len(mask) // G
  of_group = [
      set(logprobs[i : i + G][mask[i : i + G]]) for i in range(0, len(mask), G)
  ]
  seen = []
  for update in range(4):
    values = set(np.asarray(stats.behaviour_logprobs[update])[
        np.asarray(stats.token_mask[update])
    ])
    groups = {i for i in range(num_groups) if of_group[i] & values}
    assert values == set().union(*(of_group[i] for i in groups))
    assert len(groups) == num_groups // 2
    seen.append(groups)
  for epoch in (0, 2):  # All of them, each once.
    assert not seen[epoch] & seen[epoch + 1]


def test_a_whole_step_with_packed_and_halved_rows_is_one_without():
  # Rolls out and learns twice; `train_step` does not know the layout.
  divergence = divergences.build('binary_tv')
  mesh = train_step.sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1)

  def run(**options):
    step = train_step.make_train_step(
        learn=tiny_model.make_learner(
            divergence, num_minibatches=2, num_microbatches=4, **options
        ),
        rollout_fn=tiny_model.make_rollout_fn(divergence),
        threshold=divergence.threshold,
        group_size=G,
        vocab_size=64,
        state_shardings=train_step.state_shardings(
            tiny_model.make_state(tiny_model.params()), mesh
        ),
        mesh=mesh,
    )
    state = jax.tree.map(jnp.copy, tiny_model.make_state(tiny_model.params()))
    scored = tiny_model.make_scored(divergence)
    with tiny_model.quick_compilation():
      for _ in range(2):
        state, rollout, metrics = step(state, scored, tiny_model.prompts())
        rewards = (rollout.tokens[:, P] % 2).astype(jnp.float32)
        scored = ScoredRollout(rollout, rewards)
    return state, rollout, metrics

  state, rollout, metrics = run()
  others = run(arrange=packing.make_packed(
      row_length=2 * T, prompt_length=P, group_size=G, num_halvings=1
  ))
  np.testing.assert_array_equal(others[1].tokens, rollout.tokens)
  tiny_model.assert_trees_close(
      others[0].params, state.params, rtol=0, atol=1e-5
  )
  for name in ('loss', 'optimizer/grad_norm', 'divergence/mean'):
    np.testing.assert_allclose(
        others[2][name], metrics[name], rtol=1e-3, atol=1e-5, err_msg=name
    )
