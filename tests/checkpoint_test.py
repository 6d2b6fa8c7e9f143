"""What `checkpoint.py` promises, one sentence a test."""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

from absl import logging
import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import optax
import pytest

from dppo_jax import checkpoint
from dppo_jax.checkpoint import Checkpoints
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOST = {'position': [3, 7], 'answers': ['5', 'é'], 'evals': {'avg': 0.1}}


def make_arrays(seed=0, width=16, record=()):
  """A small TrainState and ScoredRollout with every kind of leaf."""
  key = jax.random.key(seed)
  params = {
      'embedding': jax.random.normal(key, (32, width)),
      'blocks': [{'scale': jnp.full((width,), 1.1 + seed, jnp.bfloat16)}],
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state = TrainState(
      step=jnp.int32(seed),
      params=params,
      opt_state=optimizer.init(params),
      key=key,
      policy_version=jnp.int32(2),
      nonfinite_in_a_row=jnp.int32(0),
  )
  logprobs = jnp.array([[-0.5, -jnp.inf, jnp.nan], [-0.0, 1e-42, -3.0]])
  rollout = Rollout(
      tokens=jnp.arange(8, dtype=jnp.int32).reshape(2, 4),
      segment_ids=jnp.ones((2, 4), jnp.int32),
      positions=jnp.zeros((2, 4), jnp.int32),
      token_mask=jnp.array([[True, False, True], [False, True, True]]),
      behaviour_logprobs=logprobs,
      record=record,
      policy_version=jnp.zeros((2,), jnp.int32),
      truncated=jnp.array([True, False]),
  )
  return state, ScoredRollout(rollout, rewards=jnp.array([0.0, 1.0]))


def make_abstract(arrays):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      arrays,
  )


def assert_bitwise_equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert isinstance(a, jax.Array)
    assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory, *steps, keep=3):
  checkpoints = Checkpoints(directory, keep=keep)
  for step in steps:
    checkpoints.save(step, make_arrays(step), HOST | {'step': step})
  checkpoints.wait()
  return checkpoints


def assert_restores(checkpoints, step):
  found, arrays, host = checkpoints.restore_latest(make_abstract(make_arrays()))
  assert found == step
  assert host == HOST | {'step': step}
  assert_bitwise_equal(arrays, make_arrays(step))


@pytest.fixture
def warnings(monkeypatch):
  lines = []
  monkeypatch.setattr(
      logging, 'warning', lambda text, *args: lines.append(text % args)
  )
  return lines


def test_restores_every_bit_of_state_rollout_and_host(tmp_path):
  assert_restores(save_steps(tmp_path, 1, 2), step=2)
  assert_restores(Checkpoints(tmp_path), step=2)  # As another process would.


def test_a_restored_key_draws_the_same_numbers(tmp_path):
  key = jax.random.key(3, impl='rbg')
  arrays = {'one': key, 'many': jax.random.split(key, 4)}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, arrays, {})
  _, restored, _ = checkpoints.restore_latest(arrays)
  assert_bitwise_equal(restored, arrays)
  assert jax.random.uniform(restored['one']) == jax.random.uniform(key)


@pytest.mark.parametrize(
    'record',
    [(jnp.ones((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)), jnp.ones((2, 0))],
    ids=['tuple', 'array_of_size_0'],
)
def test_a_record_may_be_any_pytree(tmp_path, record):
  arrays = make_arrays(record=record)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, arrays, {})
  _, restored, _ = checkpoints.restore_latest(make_abstract(arrays))
  assert_bitwise_equal(restored, arrays)


def test_there_is_nothing_to_restore_at_first(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'not' / 'there')
  assert checkpoints.restore_latest(make_arrays()) is None
  assert checkpoints.steps() == []
  assert checkpoints.latest_step() is None


def test_arrays_may_be_donated_and_host_changed_right_after_save(tmp_path):
  add_one = jax.jit(
      functools.partial(jax.tree.map, lambda x: x + 1), donate_argnums=0
  )
  checkpoints = Checkpoints(tmp_path, keep=1)
  # 16 MB, so that the files are still being written when the buffers go.
  arrays = {'a': jnp.arange(2e6), 'b': jnp.zeros(2_000_000)}
  for step in range(5):
    host = {'step': step}
    checkpoints.save(step, arrays, host)
    host['step'] = -1
    for _ in range(5):
      arrays = add_one(arrays)
    jax.block_until_ready(arrays)
    _, saved, host = checkpoints.restore_latest(make_abstract(arrays))
    assert host == {'step': step}
    np.testing.assert_array_equal(saved['b'], 5 * step)
    np.testing.assert_array_equal(saved['a'], np.arange(2e6) + 5 * step)


def test_keeps_only_the_latest(tmp_path):
  checkpoints = save_steps(tmp_path, 1, 2, 30, 4, 50, keep=2)
  assert checkpoints.steps() == [30, 50]
  assert checkpoints.latest_step() == 50
  assert sorted(os.listdir(tmp_path)) == ['30', '50']


def test_a_step_is_not_overwritten(tmp_path):
  checkpoints = save_steps(tmp_path, 1)
  with pytest.raises(ValueError, match='Step 1 is already saved'):
    checkpoints.save(1, make_arrays(), {})


def test_what_is_no_array_or_no_json_is_refused_by_name(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(TypeError, match='Leaf a/b is a float'):
    checkpoints.save(1, {'a': {'b': 1.0}}, {})
  with pytest.raises(TypeError, match='JSON'):
    checkpoints.save(1, make_arrays(), {'x': object()})
  assert checkpoints.steps() == []


def largest_file(directory):
  files = [path for path in directory.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def truncate(directory):
  path = largest_file(directory)
  os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(directory):
  path = largest_file(directory)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def flip_a_bit_of_the_host_state(directory):
  path = directory / 'manifest.json'
  path.write_text(path.read_text().replace('"avg": 0.1', '"avg": 0.3'))


def replace_the_manifest(directory):
  (directory / 'manifest.json').write_text(json.dumps({'crc32': 1}))


def fill_everything_with_garbage(directory):
  for path in directory.rglob('*'):
    if path.is_file():
      path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def empty_every_file(directory):
  for path in directory.rglob('*'):
    if path.is_file():
      os.truncate(path, 0)


def delete_data(directory):
  largest_file(directory).unlink()


def delete_every_file(directory):
  for path in directory.rglob('*'):
    if path.is_file():
      path.unlink()


DAMAGES = [
    truncate,
    flip_a_bit,
    flip_a_bit_of_the_host_state,
    replace_the_manifest,
    fill_everything_with_garbage,
    empty_every_file,
    delete_data,
    delete_every_file,
]


@pytest.mark.parametrize('damage', DAMAGES)
def test_falls_back_past_a_damaged_checkpoint(tmp_path, damage, warnings):
  save_steps(tmp_path, 1, 2)
  damage(tmp_path / '2')
  checkpoints = Checkpoints(tmp_path)
  assert_restores(checkpoints, step=1)
  (line,) = warnings
  assert 'step 2 is damaged' in line and 'falling back to step 1' in line
  assert '\n' not in line
  assert sorted(os.listdir(tmp_path)) == ['1', 'corrupt-2']
  # The step is reached again: it can be saved, and damaged, once more.
  checkpoints.save(2, make_arrays(2), HOST | {'step': 2})
  assert_restores(checkpoints, step=2)
  damage(tmp_path / '2')
  assert_restores(checkpoints, step=1)
  assert sorted(os.listdir(tmp_path)) == ['1', 'corrupt-2', 'corrupt-2-2']


@pytest.mark.parametrize('damage', [
    flip_a_bit_of_the_host_state,
    replace_the_manifest,
    fill_everything_with_garbage,
    empty_every_file,
    delete_every_file,
])
def test_what_the_newest_has_for_the_host_is_none_if_it_is_damaged(
    tmp_path, damage
):
  with Checkpoints(tmp_path / 'run') as checkpoints:
    assert checkpoints.latest_host() is None
    save_steps(tmp_path / 'run', 1, 2)
    assert checkpoints.latest_host() == HOST | {'step': 2}
    damage(tmp_path / 'run' / '2')
    assert checkpoints.latest_host() is None
  assert sorted(os.listdir(tmp_path / 'run')) == ['1', '2']


def test_who_only_reads_falls_back_and_renames_nothing(tmp_path, warnings):
  save_steps(tmp_path, 1, 2)
  truncate(tmp_path / '2')
  step, _, _ = Checkpoints(tmp_path).restore_latest(
      make_arrays(), goes_on=False
  )
  assert step == 1
  [line] = warnings
  assert 'step 2 is damaged' in line and 'falling back to step 1' in line
  assert sorted(os.listdir(tmp_path)) == ['1', '2']


@pytest.mark.parametrize('keep', [1, 2])
def test_what_a_run_deletes_while_it_is_checked_is_not_damaged(
    tmp_path, monkeypatch, warnings, keep
):
  steps = [1, 2][-keep:]
  save_steps(tmp_path, *steps)
  find, looked_at = checkpoint._find_damage, []

  def find_slowly(directory):
    looked_at.append(int(directory.name))
    if len(looked_at) == 1:  # The run saves another, and deletes all others.
      save_steps(tmp_path, 3)
      for step in steps:
        shutil.rmtree(tmp_path / str(step))
    return find(directory)

  monkeypatch.setattr(checkpoint, '_find_damage', find_slowly)
  step, _, host = Checkpoints(tmp_path).restore_latest(
      make_arrays(), goes_on=False
  )
  assert step == host['step'] == 3
  assert looked_at == [2, 3] and not warnings


def delete_files(directory):
  """What a deletion has done before it deletes the folders, too."""
  for path in directory.rglob('*'):
    if path.is_file():
      path.unlink()


@pytest.mark.parametrize('delete', [shutil.rmtree, delete_files])
def test_what_a_run_deletes_before_it_is_read_is_followed_by_a_newer_one(
    tmp_path, delete
):
  save_steps(tmp_path, 1)
  arrays, found = make_arrays(7), []

  def when_found(step, host):
    found.append((step, host['step']))
    jax.tree.map(lambda x: x.delete(), arrays)  # As a run does, twice here.
    if step == 1:
      save_steps(tmp_path, 2)
      delete(tmp_path / '1')

  step, restored, _ = Checkpoints(tmp_path).restore_latest(
      make_abstract(arrays), when_found=when_found, goes_on=False
  )
  assert found == [(1, 1), (2, 2)]
  assert step == 2
  assert_bitwise_equal(restored, make_arrays(2))


def test_who_only_reads_tries_once_what_cannot_be_restored(tmp_path):
  save_steps(tmp_path, 1, 2)
  truncate(tmp_path / '2')  # So that the newest is not the newest good one.
  other = {'another': jax.ShapeDtypeStruct((1,), jnp.float32)}
  with pytest.raises(ValueError, match='is of another model or config'):
    Checkpoints(tmp_path).restore_latest(other, goes_on=False)


def test_misses_any_one_file(tmp_path):
  save_steps(tmp_path, 1, 2)
  files = [path for path in (tmp_path / '2').rglob('*') if path.is_file()]
  assert len(files) > 5
  for path in files:
    data = path.read_bytes()
    path.unlink()
    step, arrays, _ = Checkpoints(tmp_path).restore_latest(make_arrays())
    # Never wrong: either the file was not needed or it was missed.
    assert_bitwise_equal(arrays, make_arrays(step))
    if step == 1:
      (tmp_path / 'corrupt-2').rename(tmp_path / '2')
    else:
      assert path.name in ('_CHECKPOINT_METADATA', 'commit_success.txt')
    path.write_bytes(data)


def test_never_starts_from_scratch_when_all_are_damaged(tmp_path):
  save_steps(tmp_path, 1, 2)
  truncate(tmp_path / '1')
  delete_data(tmp_path / '2')
  for _ in range(2):  # Nor at the second attempt.
    with pytest.raises(ValueError, match='Every checkpoint in .* is damaged'):
      Checkpoints(tmp_path).restore_latest(make_arrays())


@pytest.mark.parametrize(
    'other, message',
    [
        (
            make_arrays(width=8),
            r'0/params/blocks/0/scale is bfloat16\[16\] in it,'
            r' bfloat16\[8\] here',
        ),
        (
            make_arrays(record=jnp.ones((2, 3))),
            r'1/rollout/record, float32\[2, 3\], is not in it',
        ),
        (make_arrays()[:1], r'1/rollout/tokens, int32\[2, 4\] in it, is not'),
    ],
    ids=['shape', 'missing', 'extra'],
)
def test_a_mismatch_names_the_leaf_and_both_shapes(tmp_path, other, message):
  checkpoints = save_steps(tmp_path, 1, 2)
  with pytest.raises(ValueError, match=message):
    checkpoints.restore_latest(make_abstract(other))
  assert_restores(checkpoints, step=2)  # Nothing was set aside.


def test_a_failed_write_is_raised_and_leaves_no_checkpoint(
    tmp_path, monkeypatch
):
  checkpoints = save_steps(tmp_path, 1)

  def full(*args):
    raise OSError('No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr('dppo_jax.checkpoint._write_manifest', full)
    checkpoints.save(2, make_arrays(2), HOST | {'step': 2})
    with pytest.raises(OSError, match='no space is left. .*keep_checkpoints'):
      checkpoints.wait()
  assert_restores(checkpoints, step=1)
  checkpoints.save(2, make_arrays(2), HOST | {'step': 2})
  assert_restores(checkpoints, step=2)


def test_leaving_a_with_block_finishes_the_save_even_on_an_error(tmp_path):
  with pytest.raises(ZeroDivisionError):
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, make_arrays(1), HOST | {'step': 1})
      raise ZeroDivisionError
  assert_restores(Checkpoints(tmp_path), step=1)


def run_python(code, *args, **kwargs):
  """Starts Python on `code` with this repository in its path."""
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(code), *map(str, args)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=env | kwargs,
  )


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path):
  # The child resumes, checks that array and host are of one step, and saves
  # without end; it is killed at a random moment of its saves, three times.
  child = """
      import sys
      import jax.numpy as jnp
      from dppo_jax.checkpoint import Checkpoints
      checkpoints = Checkpoints(sys.argv[1], keep=2)
      found = checkpoints.restore_latest({'x': jnp.zeros(500_000)})
      step = 0
      if found:
        step, arrays, host = found
        assert host == {'step': step} and (arrays['x'] == step).all(), found
      print('resumed', step, flush=True)
      while True:
        step += 1
        arrays = {'x': jnp.full(500_000, float(step))}
        checkpoints.save(step, arrays, {'step': step})
        print('saving', step, flush=True)
  """
  generator = random.Random(1)
  committed = 0
  for _ in range(3):
    process = run_python(child, tmp_path)
    resumed = process.stdout.readline().split()
    assert resumed[:1] == ['resumed'], process.communicate()[1]
    assert int(resumed[1]) >= committed
    for _ in range(3):
      line = process.stdout.readline().split()
      assert line[:1] == ['saving'], process.communicate()[1]
      started = int(line[1])
    time.sleep(generator.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    committed = started - 1  # `save` waits for the save before it.
  checkpoints = Checkpoints(tmp_path, keep=2)
  step, arrays, host = checkpoints.restore_latest({'x': jnp.zeros(500_000)})
  assert step >= committed and host == {'step': step}
  np.testing.assert_array_equal(arrays['x'], step)
  assert not list(tmp_path.glob('corrupt-*'))
  checkpoints.save(step + 1, {'x': jnp.zeros(500_000)}, {})
  checkpoints.wait()
  assert len(os.listdir(tmp_path)) == 2  # What was left half-saved is gone.


@pytest.mark.several_devices
def test_restores_to_another_mesh(tmp_path):
  child = """
      import sys
      import jax
      import jax.numpy as jnp
      import numpy as np
      from dppo_jax.checkpoint import Checkpoints

      def mesh(*shape):
        names = ('fsdp', 'tensor')[:len(shape)]
        kinds = (jax.sharding.AxisType.Auto,) * len(shape)
        return jax.make_mesh(shape, names, axis_types=kinds)

      def place(tree, mesh, *specs):
        return jax.device_put(tree, tuple(
            jax.NamedSharding(mesh, jax.P(*spec)) for spec in specs))

      tree = (
          jnp.arange(128.0).reshape(8, 16).astype(jnp.bfloat16),
          jnp.arange(8),
          jax.random.split(jax.random.key(1), 8),
          jax.random.key(2),
      )
      old = place(tree, mesh(8), ('fsdp',), ('fsdp',), ('fsdp',), ())
      new = place(
          jax.tree.map(lambda x: x[::-1] if x.ndim else x, tree), mesh(2, 4),
          ('fsdp', 'tensor'), ('tensor',), (('fsdp', 'tensor'),), ())
      checkpoints = Checkpoints(sys.argv[1])
      checkpoints.save(1, old, {})
      _, restored, _ = checkpoints.restore_latest(new)
      for got, want, like in zip(restored, tree, new):
        assert got.sharding == like.sharding, (got.sharding, like.sharding)
        if jax.dtypes.issubdtype(got.dtype, jax.dtypes.prng_key):
          got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)
      checkpoints.close()
      print('done')
  """
  assert many_devices.run(child, tmp_path) == ['done']


def test_is_quiet(tmp_path):
  child = """
      import sys
      from absl import app
      import jax.numpy as jnp
      from dppo_jax.checkpoint import Checkpoints

      def main(argv):
        checkpoints = Checkpoints(argv[1], keep=1)
        for step in range(3):
          checkpoints.save(step, {'x': jnp.ones(3)}, {})
        assert checkpoints.restore_latest({'x': jnp.ones(3)})
        checkpoints.close()
        print('done')

      app.run(main)  # From here on absl shows INFO.
  """
  out, err = run_python(child, tmp_path).communicate()
  assert out == 'done\n', err
  assert 'orbax' not in err and 'checkpoint' not in err, err
