"""Adapters change what they are put on, alone, and are PEFT's on disk."""

import json
import math
import re

from golden import make_family_logits as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_model

from dppo_jax import lora
from dppo_jax.models import load
from dppo_jax.models import weights

ALPHA = 6.0


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """Two layers, width 32, two key and value heads of 8, inner width 48."""
  folder = tmp_path_factory.mktemp('lora')
  golden.write(folder, 'llama3', tied=True)
  return load.from_pretrained(folder)


def random_adapters(params, **options):
  """As after some training: b is not zero any more."""
  adapters = lora.init(params, jax.random.key(0), **{'rank': 3} | options)
  leaves, tree = jax.tree.flatten(adapters)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(tree, [
      0.1 * jax.random.normal(key, x.shape)
      for key, x in zip(keys, leaves, strict=True)
  ])


def pair_of(adapters, path):
  """{'a', 'b'} of a kernel."""
  flat = weights.flatten(adapters)
  return {which: flat[f'{path}/{which}'] for which in 'ab'}


def test_new_adapters_change_nothing(model):
  adapters = lora.init(model.params, jax.random.key(0), rank=4)
  merged = lora.merge(model.params, adapters, alpha=ALPHA)
  tiny_model.assert_trees_equal(merged, model.params)
  for path, x in weights.flatten(adapters).items():
    assert np.any(x) == path.endswith('/a')


@pytest.mark.parametrize('name, inputs', [
    ('k', 32), ('gate', 32), ('down', 48),
])
def test_new_adapters_are_uniform_up_to_1_over_the_root_of_inputs(
    model, name, inputs
):
  # PEFT's kaiming_uniform_(a=sqrt(5)): sqrt(6 / ((1 + 5) inputs)). Outputs are
  # 16, 48 and 32.
  adapters = lora.init(
      model.params, jax.random.key(0), rank=16, targets=[name]
  )
  [a] = (x for x in jax.tree.leaves(adapters) if np.any(x))
  scaled = np.asarray(a) * math.sqrt(inputs)
  assert 0.98 < scaled.max() <= 1 and -1 <= scaled.min() < -0.98
  # The deviation of its mean is below .02, of its mean square below .01.
  assert abs(scaled.mean()) < 0.08
  assert abs(np.mean(scaled**2) - 1 / 3) < 0.04


def test_merging_adds_alpha_over_rank_times_a_b_layer_by_layer(model):
  adapters = random_adapters(model.params, targets=('q', 'down'))
  merged = lora.merge(model.params, adapters, alpha=ALPHA)
  for part, name in (('attention', 'q'), ('mlp', 'down')):
    pair = pair_of(adapters, f'layers/{part}/{name}/kernel')
    for layer in range(2):
      a, b, before, after = (
          np.asarray(x[layer], np.float64)
          for x in (
              pair['a'], pair['b'],
              model.params['layers'][part][name]['kernel'],
              merged['layers'][part][name]['kernel'],
          )
      )
      np.testing.assert_allclose(
          after, before + ALPHA / 3 * (a @ b), rtol=0, atol=1e-6
      )
  # Everything else is as it was.
  before, after = weights.flatten(model.params), weights.flatten(merged)
  for path in set(before) - {
      f'layers/{name}/kernel' for name in ('attention/q', 'mlp/down')
  }:
    np.testing.assert_array_equal(after[path], before[path])


def test_each_target_chooses_its_projections(model):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  for target in lora.TARGETS:
    part = 'attention' if target in 'qkvo' else 'mlp'
    adapters = lora.init(
        shapes, jax.random.key(0), rank=2, targets=[target]
    )
    assert list(weights.flatten(adapters)) == [
        f'layers/{part}/{target}/kernel/{which}' for which in 'ab'
    ]
  every = lora.init(shapes, jax.random.key(0), rank=2)
  assert len(jax.tree.leaves(every)) == 2 * len(lora.TARGETS)


def test_experts_have_an_adapter_each(tmp_path):
  golden.write(tmp_path, 'mixtral', tied=True)
  model = load.from_pretrained(tmp_path)
  adapters = random_adapters(model.params, targets=('gate', 'down'))
  gate = pair_of(adapters, 'layers/mlp/experts/gate/kernel')
  assert gate['a'].shape == (2, 4, 32, 3)
  merged = lora.merge(model.params, adapters, alpha=ALPHA)
  pair = pair_of(adapters, 'layers/mlp/experts/down/kernel')
  change, a, b = (
      np.asarray(x[1, 2])
      for x in (
          merged['layers']['mlp']['experts']['down']['kernel']
          - model.params['layers']['mlp']['experts']['down']['kernel'],
          pair['a'], pair['b'],
      )
  )
  np.testing.assert_allclose(change, ALPHA / 3 * a @ b, rtol=0, atol=1e-6)


def test_parameters_keep_their_dtype(model):
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
  adapters = lora.init(params, jax.random.key(0), rank=3)
  assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype('float32')}
  merged = lora.merge(params, adapters, alpha=ALPHA)
  tiny_model.assert_trees_equal(merged, params)


@pytest.mark.parametrize('put', [lora.attach, lora.merge])
def test_gradients_reach_adapters_and_nothing_else(model, put):
  tokens = jnp.asarray(golden.batch()[0])

  def loss(params, adapters):
    logits = model.apply(put(params, adapters, alpha=ALPHA), tokens)
    return jnp.mean(jax.nn.log_softmax(logits)[..., 7])

  adapters = random_adapters(model.params)
  frozen, trained = tiny_model.jit(jax.grad(loss, argnums=(0, 1)))(
      model.params, adapters
  )
  assert not any(np.any(x) for x in jax.tree.leaves(frozen))
  assert all(np.any(x) for x in jax.tree.leaves(trained))


@pytest.mark.parametrize('case', ['llama3', 'qwen2', 'gemma2', 'mixtral'])
def test_the_unmerged_policy_is_the_merged_one(tmp_path, case):
  golden.write(tmp_path, case, tied=True)
  model = load.from_pretrained(tmp_path)
  adapters = random_adapters(model.params)
  tokens = jnp.asarray(golden.batch()[0])
  apply = tiny_model.jit(model.apply)
  base, merged, unmerged = (
      apply(params, tokens)
      for params in (
          model.params,
          lora.merge(model.params, adapters, alpha=ALPHA),
          lora.attach(model.params, adapters, alpha=ALPHA),
      )
  )
  np.testing.assert_allclose(unmerged, merged, rtol=0, atol=1e-4)
  assert jnp.max(jnp.abs(merged - base)) > 0.1


def test_the_gradient_of_adapters_makes_no_gradient_of_kernels(model):
  tokens = jnp.asarray(golden.batch()[0])
  adapters = lora.init(model.params, jax.random.key(0), rank=2)

  def products(put):
    """Shapes of all matrix products of a gradient, [outputs, inputs]."""

    def loss(adapters):
      params = put(model.params, adapters, alpha=ALPHA)
      return jnp.sum(model.apply(params, tokens))

    text = str(jax.make_jaxpr(jax.grad(loss))(adapters))
    return re.findall(r'f32\[([\d,]+)\] = dot_general', text)

  # Inner width 48, width 32; the transposed product puts outputs first.
  assert '48,32' not in products(lora.attach)
  assert '48,32' in products(lora.merge)


# On disk.


def test_a_folder_has_the_names_and_shapes_of_peft(model, tmp_path):
  adapters = random_adapters(model.params, targets=('k', 'down'))
  lora.save_pretrained(
      model, adapters, tmp_path, alpha=ALPHA, base='some/model'
  )
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['peft_type'] == 'LORA'
  assert config['base_model_name_or_path'] == 'some/model'
  assert (config['r'], config['lora_alpha']) == (3, ALPHA)
  assert config['target_modules'] == ['down_proj', 'k_proj']
  tensors = safetensors.numpy.load_file(
      tmp_path / 'adapter_model.safetensors'
  )
  # torch's Linear(in, r).weight is [r, in], Linear(r, out).weight [out, r].
  expected = {
      f'base_model.model.model.layers.{layer}.{module}.lora_{which}.weight':
      shape
      for layer in range(2)
      for module, which, shape in (
          ('self_attn.k_proj', 'A', (3, 32)),
          ('self_attn.k_proj', 'B', (16, 3)),
          ('mlp.down_proj', 'A', (3, 48)),
          ('mlp.down_proj', 'B', (32, 3)),
      )
  }
  assert {name: x.shape for name, x in tensors.items()} == expected
  prefix = 'base_model.model.model.layers.1.mlp.down_proj.'
  np.testing.assert_array_equal(
      tensors[f'{prefix}lora_A.weight'],
      pair_of(adapters, 'layers/mlp/down/kernel')['a'][1].T,
  )


@pytest.mark.parametrize('case', ['llama3', 'mixtral'])
def test_a_round_trip_keeps_every_bit(tmp_path, case):
  golden.write(tmp_path / 'model', case, tied=True)
  model = load.from_pretrained(tmp_path / 'model')
  adapters = random_adapters(model.params)
  lora.save_pretrained(model, adapters, tmp_path / 'adapter', alpha=ALPHA)
  again, alpha = lora.load_pretrained(model, tmp_path / 'adapter')
  assert alpha == ALPHA
  tiny_model.assert_trees_equal(again, adapters)


# What is wrong is named.


def test_options_that_cannot_be_are_named(model):
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="'gates'. Did you mean 'gate'"):
    lora.init(model.params, key, rank=2, targets=['gates'])
  with pytest.raises(ValueError, match='rank=0'):
    lora.init(model.params, key, rank=0)
  with pytest.raises(ValueError, match='rank=17.*at most 16'):
    lora.init(model.params, key, rank=17, targets=['k'])
  with pytest.raises(ValueError, match='no parameter'):
    lora.merge(
        model.params, {'layers': {'no': {'kernel': {'a': key}}}}, alpha=1.0
    )


def edit_config(folder, **changes):
  path = folder / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize('changes, message', [
    ({'use_dora': True}, 'use_dora=True'),
    ({'use_rslora': True}, 'use_rslora=True'),
    ({'bias': 'all'}, "bias='all'"),
    ({'rank_pattern': {'q_proj': 8}}, 'rank_pattern'),
    ({'peft_type': 'IA3'}, "peft_type='IA3'"),
    ({'r': 4}, r'shape \(3, 32\), r=4 and the model say \(4, 32\)'),
    ({'lora_alpha': None}, 'no number lora_alpha'),
])
def test_adapters_of_another_kind_are_refused(
    model, tmp_path, changes, message
):
  lora.save_pretrained(
      model, random_adapters(model.params), tmp_path, alpha=ALPHA
  )
  edit_config(tmp_path, **changes)
  with pytest.raises(ValueError, match=message) as error:
    lora.load_pretrained(model, tmp_path)
  assert str(tmp_path) in str(error.value)


def test_tensors_that_do_not_fit_are_named(model, tmp_path):
  lora.save_pretrained(
      model, random_adapters(model.params), tmp_path, alpha=ALPHA
  )
  path = tmp_path / 'adapter_model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  name = 'base_model.model.model.layers.1.mlp.up_proj.lora_B.weight'
  removed = {k: v for k, v in tensors.items() if k != name}
  safetensors.numpy.save_file(removed, path)
  with pytest.raises(ValueError, match=f"'{name}' is missing"):
    lora.load_pretrained(model, tmp_path)
  renamed = tensors | {name.replace('layers.1', 'layers.9'): tensors[name]}
  safetensors.numpy.save_file(renamed, path)
  with pytest.raises(ValueError, match='layers.9.*does not belong'):
    lora.load_pretrained(model, tmp_path)
  path.unlink()
  with pytest.raises(FileNotFoundError, match='adapter_model.safetensors'):
    lora.load_pretrained(model, tmp_path)
