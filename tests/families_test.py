"""Every model family is that of transformers, cached or not, packed or not.

The references are in `golden/`; `parity_test.py` compares with torch itself.
"""

import dataclasses
import functools
import pathlib

from golden import make_family_logits as golden
import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import safetensors.numpy
import tiny_model

from dppo_jax import divergences
from dppo_jax import rollout
from dppo_jax import sampling
from dppo_jax.models import causal_lm
from dppo_jax.models import load
from dppo_jax.models import rope
from dppo_jax.types import Prompts

HEADS = ('tied', 'untied')
each_case = pytest.mark.parametrize('name', golden.CASES)
each_head = pytest.mark.parametrize('head', HEADS)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A function from case and head to its Hugging Face folder."""
  scratch = tmp_path_factory.mktemp('families')

  @functools.cache
  def write(name, head):
    golden.write(scratch / name / head, name, tied=head == 'tied')
    return scratch / name / head

  return write


@pytest.fixture(scope='module')
def loaded(folder):
  """A function from case and head to the model with its params."""
  return functools.cache(lambda *case: load.from_pretrained(folder(*case)))


@functools.cache
def stored():
  with np.load(golden.PATH) as arrays:
    return dict(arrays)


def logits_of(model, tokens, positions, segment_ids):
  """[B, T, V]; one compilation for each model, as all shapes are the same."""
  assert tokens.shape == golden.batch()[0].shape
  tokens, positions, segment_ids = (
      jnp.asarray(x, jnp.int32) for x in (tokens, positions, segment_ids)
  )
  return np.asarray(_compiled(model.replace(params=None))(
      model.params, tokens, positions=positions, segment_ids=segment_ids
  ))


@functools.cache
def _compiled(model):
  return tiny_model.jit(model.apply)


def test_every_family_has_a_reference():
  assert {case['model_type'] for case in golden.CASES.values()} == set(
      load.FAMILIES
  )
  names = {f'{name}/{head}' for name in golden.CASES for head in HEADS}
  assert names | {'tokens', 'mask'} == set(stored())


def test_every_family_has_a_row_in_the_documentation():
  text = (pathlib.Path(__file__).parents[1] / 'docs' / 'models.md').read_text()
  for model_type, family in load.FAMILIES.items():
    file = family.__name__.rpartition('.')[2]
    assert f'| `{model_type}` | `{file}.py` |' in text


@each_case
@each_head
def test_logits_are_those_of_transformers(loaded, name, head):
  # Rows without padding, and padded left, right and on both sides, all longer
  # than the sliding window.
  tokens, mask = stored()['tokens'], stored()['mask']
  expected = stored()[f'{name}/{head}']
  assert (mask.sum(axis=1) > golden.WINDOW).all()
  # Logits that hardly differ would prove little.
  assert np.std(expected) > 0.5
  actual = logits_of(
      loaded(name, head), tokens, causal_lm.positions_of(jnp.asarray(mask)),
      mask,
  )
  np.testing.assert_allclose(actual[mask], expected, rtol=0, atol=2e-4)


@each_case
def test_packed_sequences_have_the_logits_they_have_alone(loaded, name):
  # The first 7 real tokens of row 1 and the 9 of row 3, in one row of 16.
  tokens, mask = stored()['tokens'], stored()['mask']
  counts = np.cumsum([0, *mask.sum(axis=1)])  # Where a row's logits start.
  expected = stored()[f'{name}/untied']
  expected = np.concatenate([
      expected[counts[1] :][:7], expected[counts[3] :][:9]
  ])
  row = np.concatenate([tokens[1][mask[1]][:7], tokens[3][mask[3]]])
  positions = np.concatenate([np.arange(7), np.arange(9)])
  segments = np.repeat([1, 2], [7, 9])
  actual = logits_of(
      loaded(name, 'untied'),
      *(np.tile(x, (4, 1)) for x in (row, positions, segments)),
  )
  np.testing.assert_allclose(actual[0], expected, rtol=0, atol=2e-4)


@each_case
def test_the_learner_agrees_with_what_was_recorded_while_sampling(loaded, name):
  # Two prompts of 3 and 8 tokens, two completions of up to 8 tokens of each:
  # prompts and completions are longer than the window.
  model = loaded(name, 'untied')
  rng = np.random.RandomState(2)
  mask = np.arange(8) >= np.array([[5], [0]])
  prompts = Prompts(
      np.where(mask, rng.randint(2, 64, (2, 8)), 0).astype(np.int32), mask
  )
  sampler = sampling.make_sampler(
      model.replace(params=None),
      group_size=2,
      max_completion_length=8,
      eos_ids=(1, 2),
      pad_id=0,
      temperature=1.0,
  )
  rolled, _ = tiny_model.jit(rollout.make_rollout_fn(sampler, group_size=2))(
      model.params, prompts, jax.random.key(3), jnp.int32(0)
  )
  logits = logits_of(
      model, rolled.tokens, rolled.positions, rolled.segment_ids
  )
  learned = divergences.token_logprobs(
      jnp.asarray(logits)[:, :-1], rolled.tokens[:, 1:]
  )
  sampled = np.asarray(rolled.token_mask)
  assert sampled.sum() > 16
  np.testing.assert_allclose(
      np.asarray(rolled.behaviour_logprobs)[sampled],
      np.asarray(learned)[sampled],
      rtol=0, atol=2e-5,
  )


@each_case
@each_head
def test_load_save_load_keeps_every_bit(folder, loaded, tmp_path, name, head):
  first = loaded(name, head)
  load.save_pretrained(first, tmp_path, max_shard_bytes=30_000)
  second = load.from_pretrained(tmp_path)
  assert second.config == first.config
  tiny_model.assert_trees_equal(second.params, first.params)
  files = sorted(tmp_path.glob('*.safetensors'))
  assert len(files) > 1
  after = {}
  for file in files:
    after |= safetensors.numpy.load_file(file)
  before = safetensors.numpy.load_file(
      folder(name, head) / 'model.safetensors'
  )
  assert before.keys() == after.keys()
  for key, tensor in before.items():
    assert tensor.tobytes() == after[key].tobytes(), key


@pytest.mark.parametrize('name, change', [
    ('mistral', {'sliding_window': golden.WINDOW + 1}),
    ('qwen2_window', {'layer_types': ('sliding_attention',) * 2}),
    ('gemma2', {'layer_types': ('full_attention', 'sliding_attention')}),
    ('gemma2', {'attn_logit_softcapping': None}),
    ('gemma2', {'query_pre_attn_scalar': None}),
    ('gemma3', {'rope_local_base_freq': None}),
    ('gemma3', {'rope_scaling': None}),
    ('llama3', {'rope_scaling': None}),
    ('qwen3_yarn', {'rope_scaling': None}),
    ('qwen3_yarn', {'rope_scaling': rope.YarnScaling(4.0, 64, 2.0, 1.0, 1.0)}),
    ('qwen3_yarn', {'rope_scaling': rope.YarnScaling(4.0, 64)}),
    ('qwen3_moe', {'norm_topk_prob': True}),
])
def test_the_references_tell_each_setting_apart(loaded, name, change):
  model = loaded(name, 'untied')
  other = model.replace(config=dataclasses.replace(model.config, **change))
  tokens, mask = stored()['tokens'], stored()['mask']
  actual = logits_of(
      other, tokens, causal_lm.positions_of(jnp.asarray(mask)), mask
  )
  assert np.abs(actual[mask] - stored()[f'{name}/untied']).max() > 0.01


@pytest.mark.parametrize('truncate', [True, False])
@pytest.mark.parametrize('theta, context, fast, slow, low, high', [
    # A ramp inside the head of 16, beyond its 8 waves, and beyond its 15.
    (1e4, 4096, 32, 1, 2.62, 5.63),
    (1e2, 4096, 64, 1, 4.03, 11.26),
    (10.0, 32768, 1024, 1, 5.65, 29.73),
    # And from before the first wave, as `context` is below 32 turns.
    (1e4, 64, 32, 1, -1.0, 2.02),
    (1e4, 16, 32, 2, -2.2, 0.21),
])
def test_yarn_keeps_its_ramp_within_the_head(
    theta, context, fast, slow, low, high, truncate
):
  # Sec. 3.2 of arXiv:2309.00071, with ends rounded outwards and cut to 0 and
  # width - 1, as in its code and in transformers.
  width, factor = 16, 4.0
  ends = [
      width * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(theta))
      for turns in (fast, slow)
  ]
  np.testing.assert_allclose(ends, [low, high], atol=0.01)
  if truncate:
    ends = np.floor(ends[0]), np.ceil(ends[1])
  low, high = max(ends[0], 0), min(ends[1], width - 1)
  frequencies = theta ** -(np.arange(0, width, 2) / width)
  ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
  expected = (1 - ramp) * frequencies + ramp * frequencies / factor
  scaling = rope.YarnScaling(
      factor, context, beta_fast=fast, beta_slow=slow, truncate=truncate
  )
  np.testing.assert_allclose(
      scaling(jnp.asarray(frequencies, jnp.float32)), expected, rtol=1e-4
  )
  assert scaling.magnitude == pytest.approx(1.138629)  # 0.1 ln(4) + 1.


SHARDED = """
    import sys

    import jax
    import numpy as np

    from dppo_jax import sharding
    from dppo_jax.models import load

    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, expert=2)
    tokens = np.arange(2, 34, dtype=np.int32).reshape(2, 16)
    for folder in sys.argv[1:]:
      whole = load.from_pretrained(folder)
      parts = load.from_pretrained(
          folder, shardings=lambda tree: sharding.of_params(tree, mesh)
      )
      for path, a in jax.tree_util.tree_leaves_with_path(parts.params):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        spread = a.size / a.addressable_shards[0].data.size
        print(spread, name)
        # Layers, experts: expert x fsdp x tensor. Other projections: the last.
        if name.endswith('kernel') and 'router' not in name:
          assert spread == (8 if 'experts' in name else 4), (name, spread)
        b = whole.params
        for key in path:
          b = b[key.key]
        np.testing.assert_array_equal(a, b, err_msg=name)
      logits = [
          jax.jit(m.apply)(m.params, tokens) for m in (whole, parts)
      ]
      np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)
    print('done')
"""


@pytest.mark.several_devices
def test_a_model_is_read_straight_into_its_shards(folder):
  lines = many_devices.run(SHARDED, folder('mixtral', 'untied'))
  assert lines[-1] == 'done'
