"""Two processes are one run: same results, one log, one end.

The real command, as two processes of four CPU devices each that meet on
loopback, against one process of eight. Starts are what costs here, so a few
runs are shared by all tests.
"""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import many_devices
import numpy as np
import pytest

from dppo_jax import metrics as metrics_lib
from dppo_jax import processes

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 6
SIZES = {
    'num_prompts': 8,
    'group_size': 4,
    'total_steps': STEPS,
    'eval.every': 3,
    'eval.num_prompts': 12,  # No multiple of 8: some are sampled twice.
    'eval.num_samples': 2,
    'checkpoint_every': 2,
    'keep_checkpoints': 9,
}
SLURM_PORTS = range(61440, 65535)  # Where JAX puts the job's number.

# Notes what each process scores; gets a signal after a step, and is slow then.
SPY = """
    import json, os, signal, time
    from dppo_jax import main, training
    make, check = main.make_verify_fn, training._check_finite
    when, name = json.loads(os.environ['SIGNAL_AT'])

    def spied(tokenizer, scorer):
      verify = make(tokenizer, scorer)
      def look(*, tokens, mask, **others):
        rows = [row[keep].tolist() for row, keep in zip(tokens, mask)]
        with open(os.environ['SCORED'], 'a') as file:
          file.write(json.dumps([rows, others['answers']]) + '\\n')
        return verify(tokens=tokens, mask=mask, **others)
      return look

    def at_step(config, step, *others):
      if step == when:
        os.kill(os.getpid(), getattr(signal, name))
      if when and step >= when:
        time.sleep(2)
      return check(config, step, *others)

    main.make_verify_fn, training._check_finite = spied, at_step
    main.run_train()
"""


class Done(NamedTuple):
  """What became of one process."""

  returncode: int
  stderr: str
  scored: list  # A call of the verifier each: [tokens of its rows, answers].


@pytest.fixture(scope='module')
def launch(tmp_path_factory):
  """Runs `count` processes to their end; returns what became of each."""
  shared = tmp_path_factory.mktemp('shared')
  environment = os.environ | {
      'HF_HUB_OFFLINE': '1',
      'JAX_COMPILATION_CACHE_DIR': str(shared / 'xla'),
      'JAX_LOG_COMPILES': '1',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
      'PYTHONPATH': str(ROOT),
      'TFDS_DATA_DIR': str(shared / 'tfds'),
  }

  def run(
      count, workdir, *, of_slurm=False, signal_at=(0, 0, ''), heartbeat_s=900,
      of_last=(), **options
  ):
    folder = tmp_path_factory.mktemp('out')
    who, *when = signal_at
    port = free_port(SLURM_PORTS)
    running = []
    for i in range(count):
      flags, variables = [f'--heartbeat_timeout_s={heartbeat_s}'], {}
      if of_slurm:
        variables = slurm(port, i, count)
      elif count > 1:
        flags += [f'--coordinator=127.0.0.1:{port}',
                  f'--num_processes={count}', f'--process_id={i}']
      with open(folder / f'{i}.err', 'w') as stderr:
        running.append(subprocess.Popen(
            [sys.executable, '-c', textwrap.dedent(SPY),
             f'--config={ROOT}/experiments/small/config.py',
             f'--workdir={workdir}', *flags,
             *(f'--config.{k}={v}' for k, v in (SIZES | options).items()),
             *(of_last if i == count - 1 else ())],
            env=environment | variables | {
                'SCORED': str(folder / f'{i}.jsonl'),
                'SIGNAL_AT': json.dumps(when if i == who else [0, '']),
                'XLA_FLAGS': ' '.join([
                    f'--xla_force_host_platform_device_count={8 // count}',
                    *many_devices.QUICK_FLAGS,
                ]),
            },
            stdout=stderr, stderr=stderr,
        ))
    try:
      codes = [process.wait(timeout=1800) for process in running]
    finally:
      for process in running:
        process.kill()
    return [
        Done(code, (folder / f'{i}.err').read_text(),
             read_lines(folder / f'{i}.jsonl'))
        for i, code in enumerate(codes)
    ]

  return run


def free_port(ports):
  for port in random.sample(ports, len(ports)):
    with socket.socket() as probe:
      if probe.connect_ex(('127.0.0.1', port)):
        return port
  raise OSError('no free port')


def slurm(port, index, count):
  """What `srun` sets, of a job with this port."""
  return {
      'SLURM_JOB_ID': str(port - SLURM_PORTS.start),
      'SLURM_STEP_NODELIST': '127.0.0.1',
      'SLURM_NTASKS': str(count),
      'SLURM_PROCID': str(index),
      'SLURM_LOCALID': str(index),
  }


def read_lines(path):
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_good(done, returncode=0):
  for process in done:
    assert process.returncode == returncode, process.stderr[-3000:]


def rows(workdir):
  """Metrics without what a clock measured."""
  return [
      {k: v for k, v in row.items()
       if not k.startswith('time/') and k != 'tokens/s'}
      for row in metrics_lib.read(workdir)
  ]


def weights(workdir):
  return (workdir / 'model' / 'model.safetensors').read_bytes()


def checkpoints(workdir):
  return sorted(
      int(x.name) for x in (workdir / 'checkpoints').iterdir()
      if x.name.isdigit()
  )


def as_of_step(step, workdir, copy):
  """A copy of a finished run as it was when it had saved a step."""
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / 'model')
  for later in checkpoints(copy):
    if later > step:
      shutil.rmtree(copy / 'checkpoints' / str(later))
  return copy


def calls(done):
  """Calls of the verifier as one process would have made them."""
  return [
      [[x for part in parts for x in part] for parts in zip(*together)]
      for together in zip(*(process.scored for process in done), strict=True)
  ]


def assert_same_results(actual, expected, tolerance):
  """Rewards, lengths and evaluations exactly, losses up to rounding."""
  for ours, theirs in zip(actual, expected, strict=True):
    assert ours.keys() == theirs.keys()
    for name in ours:
      if name.startswith(('eval/', 'reward/', 'tokens/', 'completion/')):
        assert ours[name] == theirs[name], (ours['step'], name)
    for name in ('loss', 'optimizer/grad_norm', 'entropy/mean'):
      if name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=tolerance), name


@pytest.fixture(scope='module')
def single(launch, tmp_path_factory):
  """One process of eight devices: its directory, and what became of it."""
  workdir = tmp_path_factory.mktemp('single') / 'run'
  done = launch(1, workdir)
  assert_good(done)
  return workdir, done


@pytest.fixture(scope='module')
def pair(launch, tmp_path_factory):
  """Two processes of four devices."""
  workdir = tmp_path_factory.mktemp('pair') / 'run'
  done = launch(2, workdir)
  assert_good(done)
  return workdir, done


@pytest.mark.several_devices
@pytest.mark.slow
def test_two_processes_sample_and_learn_what_one_does(single, pair):
  assert calls(pair[1]) == calls(single[1])  # Every token, every answer.
  assert [row['step'] for row in rows(pair[0])] == list(range(STEPS + 1))
  assert_same_results(rows(pair[0]), rows(single[0]), 1e-5)


@pytest.mark.several_devices
@pytest.mark.slow
def test_each_process_scores_its_own_rows(pair):
  first, second = ([len(x) for x, _ in done.scored] for done in pair[1])
  # 8 prompts of 4 completions each step; of 12 prompts of 2, in 8 parts of 2
  # prompts, the last 2 parts are there to fill up.
  num_evaluations = 3
  assert sorted(first) == sorted([16] * (STEPS + 1 + num_evaluations))
  assert sorted(second) == sorted([16] * (STEPS + 1) + [8] * num_evaluations)


@pytest.mark.several_devices
@pytest.mark.slow
def test_only_the_first_process_logs_and_writes(pair):
  workdir, (first, second) = pair
  assert 'Compiled the training step' in first.stderr
  assert 'Report:' in first.stderr
  assert not [x for x in second.stderr.splitlines() if x.startswith('I')]
  assert len((workdir / 'metrics.jsonl').read_text().splitlines()) == STEPS + 1
  assert {x.name for x in workdir.iterdir()} >= {
      'checkpoints', 'config.json', 'model', 'report.html', 'samples.jsonl',
  }
  described = json.loads((workdir / 'config.json').read_text())
  assert described['run']['num_processes'] == 2
  # The first half of the rows, of each split.
  for sample in metrics_lib.read_samples(workdir):
    assert any(sample['answer'] in answers for _, answers in first.scored)


@pytest.mark.several_devices
@pytest.mark.slow
def test_the_step_compiles_once(single, pair):
  for process in (*single[1], *pair[1]):
    assert process.stderr.count('Compiling jit(train_step)') == 1


@pytest.mark.several_devices
@pytest.mark.slow
def test_what_only_the_first_process_can_see_is_an_error_of_all(launch, pair):
  first, second = launch(2, pair[0], seed=1)
  assert_good((first, second), returncode=2)
  message = 'different config: seed was 0 and is 1 now'
  for process, start in ((first, 'Work directory'),
                         (second, 'Process 0 failed: Work directory')):
    assert re.search(f'^error: {start} .*{message}', process.stderr, re.M)


@pytest.mark.several_devices
@pytest.mark.slow
def test_processes_that_were_started_otherwise_are_refused(launch, tmp_path):
  done = launch(
      2, tmp_path / 'run', of_last=['--config.optimizer.learning_rate=0.003']
  )
  assert_good(done, returncode=2)
  for process in done:
    assert re.search(
        '^error: Process 1 has config.optimizer.learning_rate=0.003 and '
        'process 0 0.0003; start all with the same command.$',
        process.stderr, re.M,
    )
  assert not (tmp_path / 'run').exists()


@pytest.mark.several_devices
@pytest.mark.slow
def test_a_directory_that_not_all_see_is_refused_and_none_is_left(
    launch, tmp_path
):
  theirs = tmp_path / 'theirs'
  done = launch(2, tmp_path / 'run', of_last=[f'--workdir={theirs}'])
  assert_good(done, returncode=2)
  for process in done:
    assert f"error: Work directory '{theirs}' of process 1" in process.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.several_devices
@pytest.mark.slow
def test_a_log_that_cannot_be_opened_is_an_error_of_all(
    launch, pair, tmp_path
):
  workdir = as_of_step(2, pair[0], tmp_path / 'run')
  path = workdir / 'metrics.jsonl'
  path.write_text('{"step": 0,\n' + path.read_text())
  done = launch(2, workdir)
  assert_good(done, returncode=2)
  for process in done:
    assert 'metrics.jsonl:1 is not JSON' in process.stderr


@pytest.mark.several_devices
@pytest.mark.slow
def test_sigterm_to_one_saves_and_ends_all_and_they_continue_bitwise(
    launch, pair, tmp_path
):
  stopped = launch(2, tmp_path / 'run', signal_at=(1, 1, 'SIGTERM'))
  assert_good(stopped, returncode=143)
  for process in stopped:
    assert 'the same command continues' in process.stderr
  saved = max(checkpoints(tmp_path / 'run'))
  assert 1 <= saved < STEPS
  assert rows(tmp_path / 'run')[-1]['step'] == saved
  continued = launch(2, tmp_path / 'run', of_slurm=True)
  assert_good(continued)
  assert f'Continuing after step {saved}' in continued[0].stderr
  np.testing.assert_equal(rows(tmp_path / 'run'), rows(pair[0]))
  assert weights(tmp_path / 'run') == weights(pair[0])


@pytest.mark.several_devices
@pytest.mark.slow
def test_one_process_continues_what_two_have_saved_on_another_mesh(
    launch, single, pair, tmp_path
):
  workdir = as_of_step(2, pair[0], tmp_path / 'run')
  done = launch(
      1, workdir, **{'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}
  )
  assert_good(done)
  assert 'Continuing after step 2' in done[0].stderr
  learned = calls(done)
  assert learned == calls(single[1])[-len(learned):]
  assert_same_results(rows(workdir), rows(single[0]), 1e-4)


@pytest.mark.several_devices
@pytest.mark.slow
def test_two_continue_what_one_has_saved_and_neither_outlives_the_other(
    launch, single, tmp_path
):
  workdir = as_of_step(2, single[0], tmp_path / 'run')
  survivor, killed = launch(
      2, workdir, signal_at=(1, 5, 'SIGKILL'), heartbeat_s=20,
      # Both processes hold every row, and each scores half of them.
      **{'mesh.data': 1, 'mesh.tensor': 8},
  )
  assert killed.returncode == -signal.SIGKILL
  assert survivor.returncode == -signal.SIGABRT  # 134 in a shell.
  assert 'another task died' in survivor.stderr
  assert 'Continuing after step 2' in survivor.stderr
  known = rows(workdir)
  assert known[-1]['step'] in (4, 5)  # The log of the last step may be lost.
  assert_same_results(known, rows(single[0])[:len(known)], 1e-4)
  # Steps 0, 1 and 2 and an evaluation come before steps 3, 4 and 5 and another.
  expected = single[1][0].scored[4:8]
  together = [x._replace(scored=x.scored[:4]) for x in (survivor, killed)]
  assert calls(together) == expected
  for process in together:
    assert [len(x) for x, _ in process.scored] == [16, 12, 16, 16]


# Without other processes.


def shares(num_rows, *devices):
  """What each process has, where a device is ((start, stop), process)."""

  class Device:

    def __init__(self, process_index):
      self.process_index = process_index

  class Batch:

    def devices_indices_map(self, shape):
      assert shape == (num_rows,)
      return {Device(who): (slice(*span),) for span, who in devices}

  count = 1 + max(who for _, who in devices)
  found = [processes.share(Batch(), num_rows, i) for i in range(count)]
  return [(x.held.tolist(), x.own.tolist()) for x in found]


def test_rows_that_nobody_else_holds_are_owned():
  assert shares(4, ((0, 2), 0), ((2, 4), 1)) == [([0, 1], [0, 1]),
                                                 ([2, 3], [2, 3])]
  # Devices may be anywhere in the mesh.
  assert shares(
      4, ((0, 1), 0), ((1, 2), 1), ((2, 3), 0), ((3, 4), 1)
  ) == [([0, 2], [0, 2]), ([1, 3], [1, 3])]


def test_rows_that_several_hold_have_one_owner_and_work_is_even():
  whole = (None, None)
  assert shares(4, (whole, 0), (whole, 1)) == [([0, 1, 2, 3], [0, 1]),
                                               ([0, 1, 2, 3], [2, 3])]
  # Two parts of one row each, on devices of both processes.
  parts = [((i, i + 1), who) for i in range(2) for who in range(2)]
  assert shares(2, *parts) == [([0, 1], [0]), ([0, 1], [1])]
  # Fewer rows than processes: somebody has nothing to do.
  assert shares(1, (whole, 0), (whole, 1)) == [([0], [0]), ([0], [])]


def test_completions_follow_their_prompts():
  found = processes.of_groups(np.array([0, 3]), 2)
  np.testing.assert_array_equal(found, [0, 1, 6, 7])


def test_one_process_has_everything():
  x = np.arange(12.0, dtype=np.float32).reshape(4, 3)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = processes.place({'x': x}, sharding, 4)['x']
  share = processes.share(sharding, 4)
  for found in share:
    np.testing.assert_array_equal(found, range(4))
  np.testing.assert_array_equal(
      processes.local_rows(placed, np.array([1, 3])), x[[1, 3]]
  )
  np.testing.assert_array_equal(processes.to_main(placed), x)
  assert processes.gather({'a': 1}) == [{'a': 1}]
  np.testing.assert_array_equal(
      processes.collect(np.array([True, False]), np.array([0, 2]), 3),
      [True, False, False],
  )
  with pytest.raises(KeyError), processes.failing_together():
    raise KeyError


def test_the_first_process_that_differs_is_named_with_all_it_differs_in(
    monkeypatch
):
  assert processes.differences({'a': 1}) == []
  nan = float('nan')
  others = [{'a': 1, 'b': nan}, {'a': 2, 'c': 3, 'b': nan}, {'a': 4, 'b': nan}]
  monkeypatch.setattr(processes, 'gather', lambda x: [x, *others])
  assert processes.differences({'a': 1, 'b': nan}) == [
      (2, 'a', 2, 1), (2, 'c', 3, None)
  ]


@pytest.mark.parametrize('given, message', [
    ({'coordinator': 'a:1'}, '--num_processes is missing'),
    ({'num_processes': 2}, '--coordinator is missing'),
    ({'num_processes': 2, 'coordinator': 'a:1'}, '--process_id is missing'),
    ({'num_processes': 2, 'coordinator': 'a', 'process_id': 0}, 'has no port'),
    ({'num_processes': 2, 'coordinator': 'a:1', 'process_id': 2},
     '--process_id=2 of --num_processes=2 is impossible.*from 0 to 1'),
])
def test_flags_that_do_not_belong_together_are_named(given, message):
  with pytest.raises(ValueError, match=message):
    processes.initialize(**given)


@pytest.mark.parametrize('seconds, said', [(0, ''), (
    0.5, 'Process 1 of 3 still waits for the others at a:1, at most 300 s.'
)])
def test_who_waits_for_others_says_so_after_a_while(
    monkeypatch, caplog, seconds, said
):
  monkeypatch.setattr(processes, '_QUIET_FOR_S', 0.1)
  monkeypatch.setattr(processes, 'allow_threads', lambda: None)
  monkeypatch.setattr(
      processes.jax.distributed, 'initialize',
      lambda *_, **__: time.sleep(seconds),
  )
  processes.initialize(coordinator='a:1', num_processes=3, process_id=1)
  assert caplog.messages == [said][:bool(said)]


@pytest.mark.several_devices
@pytest.mark.skipif(sys.platform != 'linux', reason='Reads /proc.')
@pytest.mark.parametrize('how', ['flag', 'config', 'one device', 'own number'])
def test_devices_of_a_cpu_have_threads_enough_for_all_to_wait(how):
  printed = many_devices.run(f"""
      import os, pathlib, time
      os.environ['XLA_FLAGS'] = ''
      for name in ('NPROC', 'PJRT_NPROC'):
        os.environ.pop(name, None)
      os.cpu_count = lambda: 2
      if {how!r} == 'own number':
        os.environ['PJRT_NPROC'] = '9'
      if {how!r} in ('flag', 'own number'):
        os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'
      import jax
      from dppo_jax import processes
      if {how!r} == 'config':
        jax.config.update('jax_num_cpu_devices', 3)
      processes.initialize(num_processes=1)
      print(jax.device_count())
      tasks = pathlib.Path('/proc/self/task')
      time.sleep(2)  # A thread has its name when it has begun.
      print(sum(
          'XLAEigen' in task.read_text() for task in tasks.glob('*/comm')
      ))
  """)
  devices, threads = map(int, printed)
  expected = {
      'one device': (1, len(os.sched_getaffinity(0))), 'own number': (3, 9)
  }
  assert (devices, threads) == expected.get(how, (3, 12))


def test_a_plain_process_looks_for_no_other():
  # Not here: this one has devices already.
  code = """
      import os
      import jax
      from dppo_jax import main, processes
      processes.initialize()
      processes.initialize(num_processes=1)
      for name in ('JOB_ID', 'STEP_NODELIST', 'PROCID', 'LOCALID'):
        os.environ[f'SLURM_{name}'] = '0'
      os.environ['SLURM_NTASKS'] = '1'
      processes.initialize()
      assert not jax.distributed.is_initialized()
      assert processes.is_main()
  """
  subprocess.run(
      [sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, check=True
  )


def test_a_pod_of_kubernetes_is_alone_unless_it_is_one_of_a_job():
  pod = {'KUBERNETES_SERVICE_HOST': '10.0.0.1'}
  assert processes._is_alone(pod)
  assert not processes._is_alone(pod | {'JOB_COMPLETION_INDEX': '0'})
  assert not processes._is_alone(pod | {'TPU_WORKER_ID': '0'})
  assert not processes._is_alone({})
  assert not processes._is_alone({'SLURM_NTASKS': '2'})
