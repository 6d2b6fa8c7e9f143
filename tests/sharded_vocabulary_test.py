"""Divergences of logits whose vocabulary is split over devices.

Public trainers take a log-softmax of each device's own part of the vocabulary
there. Here the compiler sees one array, so nothing may change. Eight devices of
a CPU need a process of their own.
"""

import many_devices
import pytest

SCRIPT = """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from dppo_jax import divergences, sharding

    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=8, expert=1)
    split = NamedSharding(mesh, P(None, None, 'tensor'))
    key_mu, key_pi, key_token = jax.random.split(jax.random.key(0), 3)
    B, T, V = 4, 6, 64
    mu = 3 * jax.random.normal(key_mu, (B, T, V))
    pi = mu + 0.5 * jax.random.normal(key_pi, (B, T, V))
    tokens = jax.random.categorical(key_token, mu)
    moved = jax.device_put((mu, pi), split)
    assert not moved[0].is_fully_replicated

    for name in divergences.names():
      divergence = divergences.build(name)

      @jax.jit
      def measure(mu, pi, divergence=divergence):
        recorded = divergence.record(mu, tokens)
        measured = divergence.measure(pi, tokens, recorded)
        direction = jnp.zeros(())
        if divergence.direction is not None:
          direction = divergence.direction(pi, tokens, recorded)
        logprobs = divergences.token_logprobs(pi, tokens)
        return recorded, measured, direction, logprobs

      whole, parts = measure(mu, pi), measure(*moved)
      for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
      if name != 'none':
        assert float(jnp.max(whole[1])) > 0.01, name
      print(name)
"""


@pytest.mark.several_devices
def test_every_divergence_is_the_same_when_the_vocabulary_is_split():
  assert 'topk_tv' in many_devices.run(SCRIPT)


HEAD = """
    import collectives
    import jax
    import jax.numpy as jnp
    import numpy as np
    from dppo_jax import sharding

    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2, expert=1)
    V, D = 64, 32
    draw = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape)
    hidden = draw(8, 6, D)

    def losses(params, hidden):
      head = params['embed']['embedding'].T if 'embed' in params else (
          params['head']['kernel']
      )
      return jax.nn.logsumexp(hidden @ head, axis=-1)

    for params in (
        {'embed': {'embedding': draw(V, D)}}, {'head': {'kernel': draw(D, V)}}
    ):
      placed = sharding.of_params(params, mesh)
      gradient = lambda fn: lambda params, hidden: jax.grad(
          lambda params: jnp.sum(fn(params, hidden))
      )(params)
      split = jax.jit(
          gradient(sharding.by_tokens(mesh)(losses)),
          in_shardings=(placed, sharding.tokens(mesh)), out_shardings=placed,
      )
      moved = collectives.of(split.lower(params, hidden).compile().as_text())
      # Half of the vocabulary, of all of the width.
      assert max(size for _, size in moved) == V * D // 2, moved
      for one, other in zip(
          jax.tree.leaves(split(params, hidden)),
          jax.tree.leaves(jax.jit(gradient(losses))(params, hidden)),
          strict=True,
      ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
      print('as one')
"""


@pytest.mark.several_devices
def test_of_a_head_no_device_meets_more_than_its_part_of_the_vocabulary():
  assert many_devices.run(HEAD).count('as one') == 2
