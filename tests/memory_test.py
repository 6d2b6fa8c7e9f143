"""What is told about memory is what the arrays hold and the devices have."""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest
import tiny_model

from dppo_jax import memory
from dppo_jax import optim
from dppo_jax import sharding
from dppo_jax import train_step
from dppo_jax.types import ScoredRollout


def placed(tree, shardings):
  """Shapes with shardings, as of arrays on a mesh that need not exist."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree, shardings,
  )


def test_a_device_holds_its_shards_only():
  mesh = jax.sharding.AbstractMesh((1, 2, 4, 1, 1), sharding.AXES)
  tree = {
      'split': jax.ShapeDtypeStruct((8, 16), jnp.float32),
      'copied': jax.ShapeDtypeStruct((10,), jnp.bfloat16),
  }
  specs = {'split': P('tensor', 'fsdp'), 'copied': P()}
  shardings = {
      name: jax.sharding.NamedSharding(mesh, spec)
      for name, spec in specs.items()
  }
  # 8 * 16 numbers of 4 bytes over 8 devices, and 10 of 2 bytes on each.
  assert memory.per_device(placed(tree, shardings)) == 8 * 16 * 4 // 8 + 20


def test_memory_by_kind_is_that_of_the_arrays():
  params = tiny_model.MODEL.init(jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  count = sum(x.size for x in jax.tree.leaves(params))
  optimizer = optim.with_master_weights(optim.build('adamw', total_updates=1))
  state = train_step.init_state(
      params, optimizer, jax.random.key(0), with_reference=True
  )
  scored = ScoredRollout({'tokens': jnp.zeros((3, 5), jnp.int32)}, jnp.ones(3))
  kinds = memory.by_kind(state, scored)
  assert kinds['parameters'] == kinds['reference'] == 2 * count
  # Master weights and two moments, all in float32; two counters.
  assert kinds['optimizer state'] == 3 * 4 * count + 2 * 4
  assert kinds['replay'] == 0
  assert kinds['rollouts'] == 3 * 5 * 4 + 3 * 4


def test_a_donated_argument_and_its_result_are_counted_once():
  double = jax.jit(lambda x, y: (2 * x, 3 * y), donate_argnums=0)
  big, small = jnp.zeros((256, 256)), jnp.zeros(2)
  sizes = memory.of_step(double.lower(big, small).compile())
  assert sizes['arguments'] == 256 * 256 * 4 + 2 * 4
  assert sizes['results'] < 1000  # The second one, and a table of pointers.
  assert sizes['total'] == (
      sizes['arguments'] + sizes['temporary'] + sizes['results']
  )


def test_a_token_meets_its_own_experts_only():
  total, active = tiny_model.WITH_EXPERTS.num_parameters()
  # Two layers with 4 experts, of which a token has 2: three kernels of 32 x 6.
  assert total - active == 2 * (4 - 2) * 3 * 32 * 6
  dense, met = tiny_model.MODEL.num_parameters()
  assert dense == met


def test_a_run_tells_its_size_and_what_it_needs_by_kind():
  model = tiny_model.WITH_EXPERTS.replace(
      config=dataclasses.replace(
          tiny_model.WITH_EXPERTS.config, moe_intermediate_size=10_000
      )
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  mesh = jax.sharding.AbstractMesh((2,), ('data',))
  on = lambda x, spec: placed(
      x, jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, spec), x)
  )
  state = jax.eval_shape(
      lambda params: train_step.init_state(
          params, tiny_model.sgd(), jax.random.key(0)
      ),
      params,
  )
  rewards = jax.ShapeDtypeStruct((10**6,), jnp.float32)
  scored = ScoredRollout((), rewards)
  analysis = types.SimpleNamespace(
      argument_size_in_bytes=5 * 10**9, temp_size_in_bytes=3 * 10**6,
      output_size_in_bytes=12 * 10**6, alias_size_in_bytes=11 * 10**6,
  )
  compiled = types.SimpleNamespace(memory_analysis=lambda: analysis)
  told = lambda compiled: list(memory.describe(
      model, on(state, P()), on(scored, P('data')), compiled
  ))
  # Two layers with 4 experts, of which a token has 2: three kernels of 32 x
  # 10,000. An embedding of 64 x 32, attention, routers and norms are 8,640.
  assert told(compiled) == [
      '7.69 M parameters, 3.85 M of them for a token.',
      'Memory per device: parameters 30.75 MB, frozen parameters 0.00 MB, '
      'optimizer state 0.00 MB, reference 0.00 MB, replay 0.00 MB, products '
      '0.00 MB, rollouts 2.00 MB.',
      'Memory per device of the compiled step: arguments 5.00 GB, temporary '
      '3.00 MB, results 1.00 MB, total 5.00 GB.',
  ]
  unknown = types.SimpleNamespace(memory_analysis=lambda: None)
  assert told(unknown) == told(compiled)[:2]


def devices(platform, *stats):
  """Stands in for `jax.local_devices`."""
  made = [
      types.SimpleNamespace(platform=platform, memory_stats=lambda x=x: x)
      for x in stats
  ]
  return lambda: made


def test_the_smallest_device_is_the_limit(monkeypatch):
  stats = [{'bytes_limit': n, 'bytes_in_use': 7} for n in (9000, 8000)]
  monkeypatch.setattr(jax, 'local_devices', devices('gpu', *stats))
  assert memory.limit() == 8000
  monkeypatch.setattr(jax, 'local_devices', devices('gpu', stats[0], None))
  assert memory.limit() is None


def test_devices_of_a_cpu_share_its_host(monkeypatch):
  monkeypatch.setattr(memory, '_of_host', lambda physical: 1000)
  for count in (1, 4):
    monkeypatch.setattr(jax, 'local_devices', devices('cpu', *[None] * count))
    assert memory.limit() == 1000 // count


V1 = 'sys/fs/cgroup/memory/{}memory.limit_in_bytes'
V2 = 'sys/fs/cgroup/{}memory.max'


@pytest.mark.parametrize('lines, files, expected', [
    ('', {}, 1000),
    ('0::/a/b', {V2.format('a/b/'): 300, V2.format('a/'): 200}, 200),
    ('0::/a/b', {V2.format('a/b/'): 'max', V2.format(''): 2000}, 1000),
    ('5:cpu:/a\n4:memory:/a\n0::/', {V1.format('a/'): 400}, 400),
    ('4:cpu,memory:/', {V1.format(''): 2**63 - 4096}, 1000),
    # The host's path, of which a container does not see the folders.
    ('4:memory:/docker/0a', {V1.format(''): 500}, 500),
    ('5:cpu:/a', {V1.format('a/'): 400}, 1000),
], ids=['none', 'v2', 'v2-max', 'v1', 'v1-max', 'container', 'other'])
def test_a_cgroup_leaves_a_process_less_than_the_host_has(
    tmp_path, lines, files, expected
):
  for path, value in (files | {'proc/self/cgroup': lines}).items():
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(str(value))
  assert memory._of_host(1000, root=tmp_path) == expected


def test_a_host_without_cgroups_has_its_memory(tmp_path):
  assert memory._of_host(1000, root=tmp_path) == 1000
