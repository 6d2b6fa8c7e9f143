"""Experts: what the router chose, and nothing dropped."""

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

from dppo_jax import hlo
from dppo_jax import sharding
from dppo_jax.models import experts
from dppo_jax.models import mixtral
from dppo_jax.models.causal_lm import CausalLM

CONFIG = dataclasses.replace(
    tiny_model.CONFIG,
    hidden_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
)
LAYER = experts.Experts(CONFIG, rngs=nnx.Rngs(0))
GRAPH, PARAMS = nnx.split(LAYER)
ONE = dict.fromkeys(sharding.AXES, 1)


def inputs(num_tokens, seed=0):
  rng = np.random.RandomState(seed)
  x = rng.standard_normal((num_tokens, 8)).astype(np.float32)
  choices = np.stack([rng.permutation(4)[:2] for _ in range(num_tokens)])
  weights = rng.uniform(size=(num_tokens, 2)).astype(np.float32)
  return x, choices.astype(np.int32), weights


@tiny_model.jit
def run(params, x, choices, weights):
  return nnx.merge(GRAPH, params)(x, choices, weights)


def one_by_one(params, x, choices, weights):
  """The definition: for each token, its experts one after the other."""
  kernels = {part: params[part]['kernel'] for part in ('gate', 'up', 'down')}
  rows = []
  for row, experts_of_row, share in zip(x, choices, weights, strict=True):
    total = 0.0
    for expert, weight in zip(experts_of_row, share, strict=True):
      gate, up, down = (kernels[p][expert] for p in ('gate', 'up', 'down'))
      total += weight * ((jax.nn.silu(row @ gate) * (row @ up)) @ down)
    rows.append(total)
  return jnp.stack(rows)


def test_a_token_is_the_weighted_sum_of_its_experts():
  arguments = inputs(7)
  pure = nnx.to_pure_dict(PARAMS)
  np.testing.assert_allclose(
      run(PARAMS, *arguments), one_by_one(pure, *arguments), rtol=0, atol=1e-5
  )


def test_no_token_is_dropped_when_all_choose_the_same_experts():
  x, choices, weights = inputs(9)
  choices = np.tile(np.array([[3, 1]], np.int32), (9, 1))
  np.testing.assert_allclose(
      run(PARAMS, x, choices, weights),
      one_by_one(nnx.to_pure_dict(PARAMS), x, choices, weights),
      rtol=0, atol=1e-5,
  )


def test_gradients_are_those_of_the_definition():
  x, choices, weights = inputs(5)
  pure = nnx.to_pure_dict(PARAMS)

  def grouped(params, x, weights):
    state = jax.tree.unflatten(
        jax.tree.structure(PARAMS), jax.tree.leaves(params)
    )
    return jnp.sum(nnx.merge(GRAPH, state)(x, choices, weights) ** 2)

  def defined(params, x, weights):
    return jnp.sum(one_by_one(params, x, choices, weights) ** 2)

  actual, expected = (
      tiny_model.jit(jax.grad(fn, argnums=(0, 1, 2)))(pure, x, weights)
      for fn in (grouped, defined)
  )
  tiny_model.assert_trees_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('normalize', [False, True])
def test_weights_of_the_chosen_are_softmax_over_all_or_over_them(normalize):
  config = dataclasses.replace(
      CONFIG, hidden_size=4, norm_topk_prob=normalize
  )
  router = experts.Router(config, rngs=nnx.Rngs(0))
  router.kernel[...] = jnp.eye(4)  # The token is its own logits.
  choices, weights, _ = router(jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]])))
  assert choices.tolist() == [[1, 3]]
  # 0.4 and 0.3 of 1, or of 0.7.
  expected = [0.4 / 0.7, 0.3 / 0.7] if normalize else [0.4, 0.3]
  np.testing.assert_allclose(weights[0], expected, rtol=1e-6)


def test_experts_go_over_their_own_axis_of_the_mesh():
  mesh = jax.sharding.AbstractMesh((1, 2, 2, 2, 1), sharding.AXES)
  tree = jax.eval_shape(
      CausalLM(config=CONFIG, family=mixtral).init, jax.random.key(0)
  )
  specs = jax.tree.map(lambda x: x.spec, sharding.of_params(tree, mesh))
  P = jax.sharding.PartitionSpec
  mlp = specs['layers']['mlp']
  for part in ('gate', 'up'):  # [L, E, D, F]
    assert mlp['experts'][part]['kernel'] == P(None, 'expert', 'fsdp', 'tensor')
  # [L, E, F, D]
  assert mlp['experts']['down']['kernel'] == P(None, 'expert', 'tensor', 'fsdp')
  assert mlp['router']['kernel'] == P(None, 'fsdp', None)


def on_eight_devices(mesh_sizes):
  """Prints how far results and gradients are from those of one device."""
  config = dataclasses.replace(CONFIG, moe_intermediate_size=8)
  graph, params = nnx.split(experts.Experts(config, rngs=nnx.Rngs(0)))
  tokens = [x.reshape(8, 5, -1) for x in inputs(40)]

  def squares(params, x, weights, spread):
    out = nnx.merge(graph, params)(x, tokens[1], weights, spread)
    return jnp.sum(out**2)

  def found(mesh):
    run = jax.value_and_grad(
        functools.partial(squares, spread=sharding.by_experts(mesh)),
        argnums=(0, 1, 2),
    )
    return jax.device_get(tiny_model.jit(run)(params, tokens[0], tokens[2]))

  alone = found(sharding.make_mesh(**ONE, devices=jax.devices()[:1]))
  for sizes in mesh_sizes:
    others = found(sharding.make_mesh(**ONE | sizes))
    print(max(
        np.max(np.abs(a - b) / (1 + np.abs(b)))
        for a, b in zip(
            jax.tree.leaves(others), jax.tree.leaves(alone), strict=True
        )
    ))


def collectives_of_experts():
  """Prints those of a layer on eight devices, with and without `by_experts`."""
  mesh = sharding.make_mesh(**ONE | {'fsdp': 8})
  graph, params = nnx.split(experts.Experts(CONFIG, rngs=nnx.Rngs(0)))
  place = lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
  )
  specs = {'gate': sharding.EXPERTS_IN, 'up': sharding.EXPERTS_IN,
           'down': sharding.EXPERTS_OUT}
  kernels = jax.tree_util.tree_map_with_path(
      lambda path, x: place(x, specs[path[0].key]), params
  )
  tokens = [place(x.reshape(8, 50, -1), sharding.TOKENS) for x in inputs(400)]
  for spread in (sharding.by_experts(mesh), None):
    run = lambda kernels, *x, spread=spread: nnx.merge(graph, kernels)(
        *x, spread
    )
    program = hlo.parse(jax.jit(run).lower(
        kernels, *tokens
    ).compile().as_text())
    found = hlo.collectives(
        program, list(hlo.executed(program)), num_devices=8
    )
    print(json.dumps(sorted([x.kind, x.payload] for x in found)))


@pytest.mark.several_devices
def test_a_mesh_changes_neither_experts_nor_their_gradients():
  meshes = [
      {'data': 2, 'fsdp': 4},
      {'data': 2, 'fsdp': 2, 'tensor': 2},
      {'fsdp': 2, 'expert': 4},
      {'fsdp': 2, 'tensor': 2, 'expert': 2},
      {'fsdp': 2, 'sequence': 4},  # Of five tokens.
      {'tensor': 2, 'expert': 2, 'sequence': 2},
      {'fsdp': 8},
  ]
  lines = many_devices.run(f"""
      import experts_test
      experts_test.on_eight_devices({meshes})
  """)
  assert len(lines) == len(meshes)
  assert all(float(line) < 1e-5 for line in lines), lines


def kept_for_the_gradient():
  """Prints the numbers in each array that a layer keeps on eight devices."""
  mesh = sharding.make_mesh(**ONE | {'fsdp': 8})
  tokens = [x.reshape(8, 5, -1) for x in inputs(40)]
  run = lambda params: nnx.merge(GRAPH, params)(
      *tokens, sharding.by_experts(mesh)
  )
  kept = jax.eval_shape(lambda params: jax.vjp(run, params)[1], PARAMS)
  print(json.dumps([x.size for x in jax.tree.leaves(kept)]))


@pytest.mark.several_devices
def test_gathered_kernels_are_not_kept_for_the_gradient():
  [sizes] = map(json.loads, many_devices.run("""
      import experts_test
      experts_test.kept_for_the_gradient()
  """))
  # A kernel, [4, 6, 8], is kept once and not on each of eight devices.
  assert 4 * 6 * 8 in sizes
  assert max(sizes) < 8 * 4 * 6 * 8


@pytest.mark.several_devices
def test_tokens_stay_on_their_device_and_kernels_come_to_them():
  here, everywhere = map(json.loads, many_devices.run("""
      import experts_test
      experts_test.collectives_of_experts()
  """))
  # [4, 8, 6] float32, three of them.
  assert here == [['all-gather', 4 * 8 * 6 * 4]] * 3
  # The compiler's own way: the rows of all 400 tokens, two of each.
  assert max(size for _, size in everywhere) >= 400 * 2 * 8 * 4
