"""The command line, from the first step to the last bit.

Runs are tiny (four steps, a checkpoint every two) and share what XLA compiled
through a cache on disk, which makes a run take a few seconds.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

from absl import app
from absl import flags
import jax
import many_devices
from ml_collections import config_flags
import numpy as np
import pytest
import tiny_model
import whole_step

from configs import default
from dppo_jax import command_line
from dppo_jax import divergences
from dppo_jax import lora
from dppo_jax import main
from dppo_jax import metrics as metrics_lib
from dppo_jax import run_attention
from dppo_jax.models import load
from dppo_jax.models import platforms
from dppo_jax.models import weights as weights_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 4
SIZES = {
    'num_prompts': 8,
    'group_size': 4,
    'total_steps': STEPS,
    'eval.every': 2,
    'eval.num_prompts': 8,
    'eval.num_samples': 4,
    'checkpoint_every': 2,
}


@pytest.fixture(scope='module')
def cli(tmp_path_factory):
  """Runs a command in a process of its own; returns what became of it."""
  shared = tmp_path_factory.mktemp('shared')
  environment = os.environ | {
      'HF_HUB_OFFLINE': '1',
      'PYTHONPATH': str(ROOT),
      'TFDS_DATA_DIR': str(shared / 'tfds'),
      'XLA_FLAGS': ' '.join(many_devices.QUICK_FLAGS),
  }

  def run(*command, config='tv_topk.py', workdir=None, **options):
    options = {**SIZES, **options}
    config = config if '/' in config else f'{ROOT}/configs/{config}'
    return subprocess.run(
        [
            sys.executable,
            *(command or ['-m', 'dppo_jax.main']),
            f'--config={config}',
            *([f'--workdir={workdir}'] if workdir else []),
            *(f'--config.{k}={v}' for k, v in options.items()),
        ],
        cwd=shared,  # Nothing may depend on where it is started.
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

  return run


@pytest.fixture(scope='module')
def finished(cli, tmp_path_factory):
  """The work directory of a run that nobody disturbed."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  done = cli(workdir=workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  log_of(workdir).write_text(done.stderr)
  return workdir


def log_of(workdir):
  """Where what the run said is, beside its folder."""
  return workdir.with_suffix('.log')


@pytest.fixture
def copied(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'run')


def assert_one_line_error(done, message):
  """Exit code 2 and one line, no stack trace."""
  assert done.returncode == 2, (done.stdout, done.stderr[-3000:])
  assert 'Traceback' not in done.stderr
  [line] = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  assert done.stderr.splitlines()[-1] == line
  assert re.search(message, line), line


def weights(workdir):
  return (workdir / 'model' / 'model.safetensors').read_bytes()


def rows(workdir):
  """Metrics without what a clock measured."""
  return [
      {k: v for k, v in row.items()
       if not k.startswith('time/') and k != 'tokens/s'}
      for row in metrics_lib.read(workdir)
  ]


def assert_same_run(actual, expected):
  """Same weights and same metrics, bit for bit; also what was sampled."""
  assert weights(actual) == weights(expected)
  ours, theirs = rows(actual), rows(expected)
  assert [row['step'] for row in ours] == list(range(STEPS + 1))
  np.testing.assert_equal(ours, theirs)  # Takes NaN for equal.
  assert metrics_lib.read_samples(actual) == metrics_lib.read_samples(expected)
  masked = 'masked_tokens.json'
  assert (actual / masked).read_text() == (expected / masked).read_text()


def checkpoints(workdir):
  if not (workdir / 'checkpoints').exists():
    return []
  return sorted(
      int(p.name) for p in (workdir / 'checkpoints').iterdir()
      if p.name.isdigit()
  )


# A run that nobody disturbs.


@pytest.mark.slow
def test_a_run_writes_everything(finished):
  assert {path.name for path in finished.iterdir()} >= {
      'checkpoints', 'config.json', 'metrics.jsonl', 'model', 'report.html',
      'samples.jsonl', 'tensorboard',
  }
  assert checkpoints(finished) == [2, 4]
  assert '<html' in (finished / 'report.html').read_text()
  assert json.loads((finished / 'config.json').read_text())['num_prompts'] == 8
  assert [row['step'] for row in metrics_lib.read(finished)] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_every_step_has_its_metrics(finished):
  for row in metrics_lib.read(finished):
    if row['step'] % 2 == 0:  # eval.every=2, and before the first.
      assert 0 <= row['eval/avg@4'] <= row['eval/pass@4'] <= 1
    if row['step'] == 0:
      assert row['time/compile_s'] > 0
      continue
    for name in (
        'completion/length_mean', 'divergence/max', 'divergence/mean',
        'entropy/mean', 'loss', 'mask/negative', 'mask/positive',
        'mismatch/prob_gap_mean', 'optimizer/grad_norm', 'reward/mean',
        'time/learn_s', 'time/sample_s', 'time/score_s', 'time/step_s',
        'time/verifier_s', 'tokens/s',
    ):
      assert math.isfinite(row[name]), name
    assert row['time/step_s'] == pytest.approx(
        sum(row[f'time/{part}_s'] for part in ('learn', 'sample', 'score'))
    )
    # Nothing goes on meanwhile.
    assert 0 < row['time/verifier_s'] <= row['time/score_s']
    assert row['on_policy/log_ratio_max'] < 1e-5
    assert row['on_policy/divergence_max'] < 1e-5
    assert row['policy/version'] == 4 * row['step']
    assert row['policy/age_max'] == 0
    assert row['optimizer/skipped'] == 0


@pytest.mark.slow
def test_a_run_says_before_its_first_step_what_its_step_needs(finished):
  start, *_ = metrics_lib.read(finished)
  before, _ = log_of(finished).read_text().split('] step 0:')
  said = [line.split('] ', 1)[-1] for line in before.splitlines()]
  # One behind the other.
  first = said.index(
      f"Compiled the training step in {start['time/compile_s']:.1f} s."
  )
  of_model, of_kinds, of_step = said[first + 1 : first + 4]
  count, _ = load.from_pretrained('embedded').num_parameters()
  assert of_model == f'{count / 1e6:.2f} M parameters.'

  def sizes(line, title):
    """In MB, by name."""
    assert line.startswith(f'{title}: ') and line.endswith(' MB.')
    listed = line.removeprefix(f'{title}: ').removesuffix(' MB.')
    pairs = (x.rsplit(' ', 1) for x in listed.split(' MB, '))
    return {name: float(size) for name, size in pairs}

  lasting = sizes(of_kinds, 'Memory per device')
  # Two moments for each parameter, all in float32.
  assert lasting['parameters'] == pytest.approx(4e-6 * count, abs=0.01)
  assert lasting['optimizer state'] == pytest.approx(8e-6 * count, abs=0.01)
  step = sizes(of_step, 'Memory per device of the compiled step')
  assert step['arguments'] == pytest.approx(sum(lasting.values()), abs=0.1)
  assert step['total'] > step['temporary'] > 1


@pytest.mark.slow
def test_the_saved_model_is_the_last_checkpoint_and_evaluates_the_same(
    cli, finished
):
  last = metrics_lib.read(finished)[-1]
  trained = load.from_pretrained(finished / 'model')
  start = load.from_pretrained('embedded')
  assert any(
      (a != b).any() for a, b in zip(
          jax.tree.leaves(trained.params),
          jax.tree.leaves(start.params),
          strict=True,
      )
  )
  from_checkpoint = cli('-m', 'dppo_jax.evaluate', workdir=finished)
  from_folder = cli(
      '-m', 'dppo_jax.evaluate', **{'model.name': finished / 'model'}
  )
  for done, step in ((from_checkpoint, STEPS), (from_folder, 0)):
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed.pop('step') == step
    assert printed == {k: last[k] for k in printed}
    assert set(printed) >= {'eval/avg@4', 'eval/pass@1', 'eval/pass@4'}


@pytest.mark.slow
def test_a_run_that_has_not_ended_is_exported_as_it_would_be_at_its_end(
    cli, finished, tmp_path
):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  without_results(workdir)
  done = cli('-m', 'dppo_jax.export', workdir=workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  for path in (finished / 'model').iterdir():
    assert (workdir / 'model' / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_only_the_config_of_a_run_exports_it(cli, finished, tmp_path):
  done = cli('-m', 'dppo_jax.export', workdir=finished, group_size=16)
  assert_one_line_error(done, 'different config: group_size was .* is 16 now')
  done = cli('-m', 'dppo_jax.export', workdir=tmp_path / 'nothing')
  assert_one_line_error(done, 'no run was saved there')


# A run that is disturbed.


def without_results(workdir):
  """Nothing that only the end of a run writes."""
  shutil.rmtree(workdir / 'model')
  (workdir / 'report.html').unlink()
  (workdir / 'masked_tokens.json').unlink()


def damage_last_checkpoint(workdir):
  files = (workdir / 'checkpoints' / str(STEPS)).rglob('*')
  largest = max(
      (path for path in files if path.is_file()),
      key=lambda path: path.stat().st_size,
  )
  largest.write_bytes(largest.read_bytes()[:-100])


@pytest.mark.slow
def test_a_run_resumed_from_step_2_ends_bitwise_the_same(
    cli, finished, copied
):
  without_results(copied)
  damage_last_checkpoint(copied)
  done = cli(workdir=copied)
  assert done.returncode == 0, done.stderr[-3000:]
  assert re.search('step 4 is damaged.*falling back to step 2', done.stderr)
  assert 'Continuing after step 2' in done.stderr
  assert_same_run(copied, finished)


@pytest.mark.slow
def test_a_run_that_reuses_forward_passes_is_resumed_bitwise_the_same(
    cli, tmp_path
):
  options = {'learner.reuse_forward': True, 'learner.num_minibatches': 1}
  whole, workdir = tmp_path / 'whole', tmp_path / 'run'
  assert cli(workdir=whole, **options).returncode == 0
  shutil.copytree(whole, workdir)
  without_results(workdir)
  damage_last_checkpoint(workdir)
  done = cli(workdir=workdir, **options)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'Continuing after step 2' in done.stderr
  assert_same_run(workdir, whole)


# Does something to the run after a step has been computed.
AT_STEP = """
    import os, signal, sys
    from dppo_jax import main
    from dppo_jax import training
    refuse = training._check_finite
    def at_step(config, step, metrics, checkpoints):
      healthy = refuse(config, step, metrics, checkpoints)
      if step == {step}:
        os.kill(os.getpid(), signal.{signal})
      return healthy
    training._check_finite = at_step
    main.run_train()
"""


def disturb(cli, workdir, name, step=3):
  code = textwrap.dedent(AT_STEP.format(signal=name, step=step))
  return cli('-c', code, workdir=workdir)


# Tells what the host does, and when.
TELL = """
    import jax
    from dppo_jax import backlog
    from dppo_jax import logbook
    from dppo_jax import main
    from dppo_jax import training
    from dppo_jax.tasks import prompts

    def tell(owner, name):
      call = getattr(owner, name)
      def told(*args, **kwargs):
        print('called', name, flush=True)
        return call(*args, **kwargs)
      setattr(owner, name, told)

    tell(backlog.Backlog, 'pop')
    tell(prompts.PromptIterator, 'prefetch')
    tell(logbook.Logbook, 'flush')
    tell(training, 'score')
    tell(jax, 'block_until_ready')
    main.run_train()
"""


@pytest.mark.slow
def test_the_host_logs_verifies_and_reads_while_the_device_works(cli, tmp_path):
  done = cli(
      '-c', textwrap.dedent(TELL), workdir=tmp_path / 'run', staleness=1,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  called = ' '.join(re.findall(r'^called (\w+)', done.stdout, re.M))
  # The rollout that is scored is there already.
  called = called.replace('block_until_ready score', 'score').split()
  # What is learned from is taken right before a step is dispatched.
  starts = [i for i, name in enumerate(called) if name == 'pop']
  assert len(starts) == SIZES['total_steps']
  meanwhile = [
      called[i + 1 : called.index('block_until_ready', i)] for i in starts
  ]
  assert ['prefetch', 'flush', 'score'] in meanwhile, meanwhile
  assert all(x[:2] == ['prefetch', 'flush'] for x in meanwhile), meanwhile


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_bitwise_the_same(
    cli, finished, tmp_path
):
  workdir = tmp_path / 'run'
  assert disturb(cli, workdir, 'SIGKILL').returncode == -signal.SIGKILL
  assert not (workdir / 'model').exists()
  assert max(checkpoints(workdir), default=0) <= 2
  done = cli(workdir=workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  assert_same_run(workdir, finished)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_with_clean_logs(
    cli, finished, tmp_path
):
  workdir = tmp_path / 'run'
  disturb(cli, workdir, 'SIGKILL', step=1)
  assert not checkpoints(workdir)
  done = cli(workdir=workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert steps == list(range(STEPS + 1))
  assert_same_run(workdir, finished)


@pytest.mark.slow
def test_sigterm_saves_and_exits_143_and_the_run_continues(
    cli, finished, tmp_path
):
  workdir = tmp_path / 'run'
  done = disturb(cli, workdir, 'SIGTERM')
  assert done.returncode == 143
  assert 'the same command continues' in done.stderr
  assert max(checkpoints(workdir)) == 3  # Where it was, not step 2.
  done = cli(workdir=workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'Continuing after step 3' in done.stderr
  assert_same_run(workdir, finished)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(cli, finished, copied):
  done = cli(workdir=copied)
  assert done.returncode == 0, done.stderr[-3000:]
  assert f'has taken {STEPS} steps' in done.stderr
  assert_same_run(copied, finished)
  for name in ('scatter.json', 'masked_tokens.json'):
    assert (copied / name).read_text() == (finished / name).read_text()
  assert metrics_lib.read(copied) == metrics_lib.read(finished)
  assert checkpoints(copied) == checkpoints(finished)


@pytest.mark.slow
def test_the_steps_asked_for_are_traced(cli, finished, tmp_path):
  workdir = tmp_path / 'run'
  done = cli(workdir=workdir, profile_steps=1)
  assert done.returncode == 0, done.stderr[-3000:]
  [trace] = workdir.glob('profile/**/*.xplane.pb')
  assert trace.stat().st_size > 1000
  assert_same_run(workdir, finished)  # Looking changes nothing.


@pytest.mark.parametrize('platform, length, asked, stages', [
    ('cpu', 20, 0, 1),
    ('cpu', 300, 0, 2),
    ('tpu', 4096, 0, 4),
    ('tpu', 4096, 8, 8),
    ('cuda', 4096, 0, 1),  # Its kernel reads only what is visible.
    ('gpu', 4096, 0, 4),
])
def test_a_cache_that_is_read_as_a_whole_grows_in_stages(
    platform, length, asked, stages
):
  config = default.get_config()
  config.max_completion_length = length
  config.sampling.num_stages = asked
  config.sampling.dtype = 'bfloat16'
  with platforms.traced_for(platform):
    found = run_attention.num_stages(
        config, whole_step.make_mesh(), _with_wide_heads(tiny_model.MODEL)
    )
  assert found == stages


def _with_wide_heads(model):
  """As kernels need them."""
  return model.replace(config=dataclasses.replace(model.config, head_dim=128))


def test_compiled_programs_are_kept_where_the_config_says(
    tmp_path, monkeypatch
):
  option = 'jax_compilation_cache_dir'
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv('HOME', str(tmp_path))
  try:
    jax.config.update(option, None)
    main._use_compilation_cache('')
    assert jax.config.jax_compilation_cache_dir is None
    main._use_compilation_cache('~/compiled')
    assert jax.config.jax_compilation_cache_dir == f'{tmp_path}/compiled'
    main._use_compilation_cache('~/another')  # What is set goes before.
    assert jax.config.jax_compilation_cache_dir == f'{tmp_path}/compiled'
    jax.config.update(option, None)
    # By default, in a folder of who runs it.
    main._use_compilation_cache(default.get_config().compilation_cache)
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
    assert tmp_path in folder.parents
  finally:
    jax.config.update(option, before)


@pytest.mark.slow
def test_another_config_does_not_touch_the_work_directory(cli, copied):
  before = {p: p.read_bytes() for p in copied.rglob('*') if p.is_file()}
  done = cli(workdir=copied, seed=1)
  assert_one_line_error(done, 'different config: seed was 0 and is 1 now')
  assert before == {p: p.read_bytes() for p in copied.rglob('*') if p.is_file()}


def test_a_run_without_the_wandb_it_asks_for_leaves_nothing(
    tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  config = default.get_config()
  config.wandb = True
  with pytest.raises(ImportError, match=r"pip install 'dppo_jax\[wandb\]'"):
    main.train(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_updates_that_are_not_finite_stop_the_run_and_are_never_saved(
    cli, finished, tmp_path
):
  # Every update at this rate makes infinite weights: 4 of step 1 and 4 of step
  # 2 are skipped, which is at least 5 in a row.
  workdir = tmp_path / 'run'
  options = {
      'optimizer.learning_rate': 1e38,
      'optimizer.schedule': 'constant',
      'max_nonfinite_updates': 5,
      'checkpoint_every': 1,
      'eval.every': 100,
  }
  done = cli(workdir=workdir, **options)
  assert_one_line_error(
      done, 'in a row .* not finite.*none was saved before.*--workdir'
  )
  last = rows(workdir)[-1]
  assert last['optimizer/nonfinite_in_a_row'] >= 5
  assert last['optimizer/skipped'] == 4
  assert last['policy/version'] == 0
  assert checkpoints(workdir) == []


# Old data: replayed, or late.

STALE = {
    'config': 'r2vpo.py',
    'staleness': 1,
    'replay.capacity': 2,
    'replay.max_age': 11,  # Four updates a step: two steps late, at its end.
}


@pytest.fixture(scope='module')
def stale(cli, tmp_path_factory):
  """A run whose rollouts wait for a step and are learned from again."""
  workdir = tmp_path_factory.mktemp('stale') / 'run'
  done = cli(workdir=workdir, **STALE)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir


@pytest.mark.slow
def test_a_rollout_that_waits_a_step_is_as_old_as_the_updates_of_a_step(stale):
  learned = rows(stale)[1:]
  assert [row['policy/version'] for row in learned] == [4, 8, 12, 16]
  # The start model sampled what the first two steps learn from.
  assert [row['policy/age_max'] for row in learned] == [0, 4, 4, 4]
  # At its first update a rollout in the buffer is 8 old, at its last one 11.
  assert [row['replay/age_max'] for row in learned] == [0, 4, 8, 8]
  assert [row['replay/slots_filled'] for row in learned] == [0, 1, 2, 2]
  for row in learned[1:]:
    assert row['replay/groups'] > 0
    assert 0 < row['replay/gradient_share'] < 1
  for row in learned:
    for name in ('dual/multiplier', 'constraint/violation', 'constraint/value'):
      assert math.isfinite(row[name])
  assert len({row['dual/multiplier'] for row in learned}) == STEPS


@pytest.mark.slow
def test_a_resumed_run_continues_with_its_buffer_its_dual_and_what_was_late(
    cli, stale, tmp_path
):
  workdir = shutil.copytree(stale, tmp_path / 'run')
  without_results(workdir)
  damage_last_checkpoint(workdir)
  done = cli(workdir=workdir, **STALE)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'Continuing after step 2' in done.stderr
  assert_same_run(workdir, stale)


# Adapters.

ADAPTED = {
    'lora.rank': 4,
    'lora.targets': ('q', 'down'),
    # Those of the first two layers stay as they are.
    'learning_rates': (('layers/[01]/', 0.0), ('/b$', 4.0)),
    'extras.kl_coefficient': 0.01,
    'replay.capacity': 2,
}


@pytest.fixture(scope='module')
def adapted(cli, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('adapted') / 'run'
  done = cli(workdir=workdir, **ADAPTED)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir


@pytest.mark.slow
def test_adapters_and_base_are_the_model_that_was_saved(adapted):
  base, saved = (
      load.from_pretrained(x) for x in ('embedded', adapted / 'model')
  )
  adapters, alpha = lora.load_pretrained(base, adapted / 'adapter')
  before, merged, after = map(weights_lib.flatten, (
      base.params,
      jax.jit(functools.partial(lora.merge, alpha=alpha))(
          base.params, adapters
      ),
      saved.params,
  ))
  for path, x in after.items():
    np.testing.assert_array_equal(x, merged[path])
    moved = [bool(np.any(a != b)) for a, b in zip(x, before[path])]
    if path.endswith(('/q/kernel', '/down/kernel')):
      assert moved == [False, False, True, True], path
    else:
      assert not any(moved), path


@pytest.mark.slow
def test_a_run_with_adapters_learns_replays_and_saves_little(adapted):
  learned = rows(adapted)[1:]
  for row in learned:
    # Sampled from the merged policy, learned with the unmerged one.
    assert row['optimizer/grad_norm'] > 0
    assert row['on_policy/log_ratio_max'] < 1e-4
  assert learned[1]['replay/groups'] > 0
  # Neither the base nor a copy of it is in a checkpoint.
  files = (adapted / 'checkpoints' / str(STEPS)).rglob('*')
  size = sum(path.stat().st_size for path in files if path.is_file())
  assert size < (adapted / 'model' / 'model.safetensors').stat().st_size / 2


@pytest.mark.slow
def test_adapters_resumed_from_step_2_end_bitwise_the_same(
    cli, adapted, tmp_path
):
  workdir = shutil.copytree(adapted, tmp_path / 'run')
  without_results(workdir)
  shutil.rmtree(workdir / 'adapter')
  damage_last_checkpoint(workdir)
  done = cli(workdir=workdir, **ADAPTED)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'Continuing after step 2' in done.stderr
  assert_same_run(workdir, adapted)
  name = 'adapter/adapter_model.safetensors'
  assert (workdir / name).read_bytes() == (adapted / name).read_bytes()
  evaluated = cli('-m', 'dppo_jax.evaluate', workdir=workdir, **ADAPTED)
  assert evaluated.returncode == 0, evaluated.stderr[-3000:]
  printed = json.loads(evaluated.stdout.splitlines()[-1])
  assert printed.pop('step') == STEPS
  last = metrics_lib.read(adapted)[-1]
  assert printed == {k: last[k] for k in printed}
  others = ADAPTED | {'lora.alpha': 3200.0}
  refused = cli('-m', 'dppo_jax.evaluate', workdir=workdir, **others)
  assert_one_line_error(refused, r'lora.alpha was .* is 3200\.0 now. Pass the')


@pytest.mark.slow
def test_a_base_that_has_changed_is_named(cli, tmp_path):
  model = load.from_pretrained('embedded')
  folder, workdir = tmp_path / 'model', tmp_path / 'run'
  load.save_pretrained(model, folder, tokenizer=load.EMBEDDED)
  options = ADAPTED | {'model.name': folder, 'total_steps': 1}
  assert cli(workdir=workdir, **options).returncode == 0
  model.params['norm']['scale'] *= 1.01
  load.save_pretrained(model, folder, tokenizer=load.EMBEDDED)
  done = cli(workdir=workdir, **options)
  assert_one_line_error(
      done, 'model.name=.* has other weights than when .* step 1 was saved'
  )


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_rows_only(cli, tmp_path):
  row = lambda i: json.dumps({'prompt': f'{i}+{i}=', 'answer': 2 * i})
  rows = [row(i) for i in range(9)]
  train, test = tmp_path / 'train.jsonl', tmp_path / 'test.jsonl'
  train.write_text('\n'.join(rows))
  test.write_text('\n'.join(rows))
  options = {
      'task.train_path': train, 'task.test_path': test, 'total_steps': 1,
      'config': 'jsonl.py', 'workdir': tmp_path / 'run',
  }
  done = cli(**options)
  assert done.returncode == 0, done.stderr[-3000:]
  train.write_text('\n'.join(rows[::-1]))
  done = cli(**options)
  assert_one_line_error(
      done, 'data position was saved with rows=.* start a new run in another'
  )
  # Who only looks may have others, and another seed.
  done = cli('-m', 'dppo_jax.evaluate', seed=1, **options)
  assert done.returncode == 0, done.stderr[-3000:]


# Little memory.

# A device has so many bytes.
WITH_LIMIT = """
    from dppo_jax import main, memory
    memory.limit = lambda: {limit}
    main.run_train()
"""


def run_with_limit(cli, workdir, limit, **options):
  code = textwrap.dedent(WITH_LIMIT.format(limit=limit))
  return cli('-c', code, workdir=workdir, **options)


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_one_line_and_leaves_nothing(cli, tmp_path):
  workdir = tmp_path / 'run'
  done = run_with_limit(cli, workdir, 30_000_000)
  assert_one_line_error(
      done, 'needs .* MB on each device, which has 30.00 MB. Most of it is '
      r'temporary, .* raise config.learner.num_microbatches \(now 1, and 0 '
  )
  assert not workdir.exists()  # The same --workdir may have a way out.
  done = run_with_limit(cli, workdir, 10_000_000)
  assert_one_line_error(done, 'What lasts .* Most of it is optimizer state')


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_refused_before_the_run(
    cli, tmp_path
):
  workdir, large = tmp_path / 'run', {'eval.num_samples': 256}
  done = run_with_limit(cli, workdir, 60_000_000, **large)
  assert_one_line_error(
      done, 'Held-out evaluation needs .* MB on each device beside the .* and '
      'there are 60.00 MB. To lower it: set config.eval.num_slots .now 0, all '
  )
  assert not workdir.exists()
  done = run_with_limit(
      cli, workdir, 60_000_000, total_steps=1, **large, **{'eval.num_slots': 64}
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_number_of_micro_batches_that_fits_is_as_if_it_were_given(
    cli, tmp_path
):
  chosen, given = tmp_path / 'chosen', tmp_path / 'given'
  number = 'learner.num_microbatches'
  done = run_with_limit(cli, chosen, 34_000_000, **{number: 0})
  assert done.returncode == 0, done.stderr[-3000:]
  *_, used = rows(chosen)
  assert used['learner/microbatches'] > 1
  assert f"{number}={used['learner/microbatches']:.0f}: " in done.stderr
  config = json.loads((chosen / 'config.json').read_text())
  assert config['learner']['num_microbatches'] == 0
  done = cli(workdir=given, **{number: int(used['learner/microbatches'])})
  assert done.returncode == 0, done.stderr[-3000:]
  assert_same_run(chosen, given)
  # An evaluation takes no step.
  done = cli('-m', 'dppo_jax.evaluate', workdir=chosen, **{number: 0})
  assert done.returncode == 0, done.stderr[-3000:]
  assert number not in done.stderr


# Other data.


@pytest.fixture
def data(tmp_path):
  """Twenty sums to learn from and eight to be tested on, as files."""
  sums = [(a, b) for a in range(20, 27) for b in range(30, 34)]
  for name, part in (('train', sums[:20]), ('test', sums[20:])):
    lines = [
        json.dumps({'prompt': f'{a}+{b}=', 'answer': a + b}) for a, b in part
    ]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
  return {
      f'task.{name}_path': tmp_path / f'{name}.jsonl'
      for name in ('train', 'test')
  }


@pytest.mark.slow
def test_a_run_on_json_lines_from_end_to_end(cli, data, tmp_path):
  done = cli(config='jsonl.py', workdir=tmp_path / 'run', **data)
  assert done.returncode == 0, done.stderr[-3000:]
  samples = metrics_lib.read_samples(tmp_path / 'run')
  assert {row['split'] for row in samples} == {'train', 'test'}
  for row in samples:
    a, b = re.fullmatch(r'(\d+)\+(\d+)=', row['prompt']).groups()
    assert row['answer'] == str(int(a) + int(b))
  # The embedded model can add.
  assert metrics_lib.read(tmp_path / 'run')[-1]['reward/mean'] > 0


@pytest.mark.slow
def test_a_run_on_the_task_math_from_files_with_workers(cli, data, tmp_path):
  files = {
      f'task.{part}.{field}': value
      for part in ('train', 'test')
      for field, value in {
          'source': 'file',
          'name': data[f'task.{part}_path'],
          'question': 'prompt',
          'extract': 'whole',
      }.items()
  }
  done = cli(
      config='math.py:gsm8k', workdir=tmp_path / 'run',
      **files | {
          'task.chat_template': False,
          'task.instruction': '',
          'task.scorer': 'answer_after_hashes',
          'scoring.num_workers': 1,
          'model.name': 'embedded',
          'max_prompt_length': 8,
          'max_completion_length': 20,
          'learner.num_microbatches': 1,
          'total_steps': 2,
      },
  )
  assert done.returncode == 0, done.stderr[-3000:]
  last = metrics_lib.read(tmp_path / 'run')[-1]
  assert last['reward/mean'] > 0
  assert last['verifier/errors'] == last['verifier/timeouts'] == 0


OWN_VERIFIER = """
from dppo_jax.tasks import scoring
def judge(completion, answer):
  if answer.endswith('3'):
    raise KeyError(answer)
  return 0.5 * scoring.answer_after_hashes(completion, answer)
"""


@pytest.mark.slow
def test_your_own_verifier_judges_and_its_errors_are_counted(
    cli, data, tmp_path
):
  (tmp_path / 'own.py').write_text(OWN_VERIFIER)
  done = cli(
      config='jsonl.py', workdir=tmp_path / 'run',
      **data | {'task.verifier': f'{tmp_path}/own.py:judge'},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  rows = metrics_lib.read(tmp_path / 'run')
  assert sum(row['verifier/errors'] for row in rows) > 0
  assert all(row['verifier/crashes'] == 0 for row in rows)
  assert all(row['verifier/timeouts'] == 0 for row in rows)
  samples = metrics_lib.read_samples(tmp_path / 'run')
  assert {row['reward'] for row in samples} == {0.0, 0.5}
  failed = [row for row in samples if row['answer'].endswith('3')]
  assert failed and not any(row['reward'] for row in failed)


@pytest.mark.slow
def test_a_malformed_row_is_named_by_file_and_line(cli, data, tmp_path):
  path = data['task.train_path']
  lines = path.read_text().splitlines()
  lines[6] = '{"prompt": "1+1="}'
  path.write_text('\n'.join(lines))
  done = cli(config='jsonl.py', workdir=tmp_path / 'run', **data)
  assert_one_line_error(done, "train.jsonl, line 7: field 'answer' is missing")


# Mistakes on the command line.


@pytest.mark.slow
@pytest.mark.parametrize('arguments, message', [
    ({'total_step': 3}, 'total_step.*Did you mean.*total_steps'),
    ({'config': 'default.py:grpoo'}, "'grpoo'. Did you mean 'grpo'"),
    ({'divergence.k': 455}, 'k=455 .* vocabulary of 454 tokens'),
    ({'model.name': './nowhere'}, "Model './nowhere' does not exist"),
    ({'model.name': __file__}, 'is a file that does not end in .*give the fol'),
    ({'model.nmae': 'embedded'}, "config field 'nmae'. Did you mean 'name'"),
    ({'config': '/nowhere/config.py'},
     "There is no file '/nowhere/config.py'. Configs are in configs/"),
    ({'task.chat_template': True}, 'tokenizer of this model has no chat templ'),
    ({'task.verifier': '/nowhere/own.py:f'}, 'no file /nowhere/own.py'),
    ({'dual.limit': 0.02}, "config field 'dual.limit'.*default.py:NAME"),
    ({'config': 'tv_topk.py:grpo'}, 'takes no :NAME.*--config.algorithm=NAME'),
    ({'task': 'math'}, "config.task holds several options and is not 'math'"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else '')
def test_a_mistake_is_one_line_and_exit_code_2(
    cli, tmp_path, arguments, message
):
  done = cli(workdir=tmp_path / 'run', **arguments)
  assert_one_line_error(done, message)


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_the_default_directory_is_that_of_the_algorithm(monkeypatch):
  monkeypatch.chdir(ROOT)
  for arguments, expected in (
      (['--config=configs/tv_topk.py'], 'runs/tv_topk'),
      (['--config=configs/default.py:grpo'], 'runs/default-grpo'),
      (['--config=configs/tv_topk.py', '--config.algorithm=grpo'],
       'runs/tv_topk-grpo'),
      (['--config=configs/default.py:grpo', '--config.algorithm=grpo'],
       'runs/default-grpo'),
  ):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values)
    monkeypatch.setattr(command_line.flags, 'FLAGS', values)
    monkeypatch.setattr(sys, 'argv', ['main', *arguments])
    values(sys.argv)
    assert command_line.default_workdir() == expected


@pytest.mark.slow
def test_a_config_is_given_once(cli, tmp_path):
  again = f'--config={ROOT}/configs/grpo.py'
  done = cli('-m', 'dppo_jax.main', again, workdir=tmp_path / 'run')
  assert_one_line_error(done, '--config is given 2 times: .*grpo.py')


@pytest.mark.parametrize('name', [
    'configs/grpo.py', 'configs/paper/sanity.py', 'experiments/small/config.py',
])
def test_a_config_of_a_checkout_imports_its_configs_from_anywhere(
    monkeypatch, tmp_path, name
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [])
  command_line._make_configs_importable(['main', f'--config={ROOT / name}'])
  assert sys.path == [str(ROOT)]


@pytest.mark.slow
def test_a_config_outside_a_checkout_is_told_where_to_start(tmp_path):
  (tmp_path / 'dppo_jax').symlink_to(ROOT / 'dppo_jax')
  (tmp_path / 'own.py').write_text('from configs import default\n')
  done = subprocess.run(
      [sys.executable, '-m', 'dppo_jax.main', '--config=own.py'], cwd=tmp_path,
      env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
      capture_output=True, text=True, check=False,
  )
  assert_one_line_error(done, 'own.py imports `configs`.*start in the checkout')


@pytest.mark.slow
@pytest.mark.parametrize('line, message', [
    ("{}['beta']", "own.py, line 2: KeyError: 'beta'"),  # No setting's name.
    ('return confg', "own.py, line 2: NameError: name 'confg' is not defined"),
    ('return None.x', "own.py, line 2: AttributeError: 'NoneType' object has"),
    ('from configs import default; default.get_config().update(xyzzy=1)',
     "Unknown config field 'xyzzy' for this algorithm or task.$"),
    ('from configs import default; default.get_config().xyzzy = 1',
     "Unknown config field 'xyzzy' for this algorithm or task.$"),
])
def test_a_mistake_in_a_config_file_is_named_by_its_line(
    cli, tmp_path, line, message
):
  config = tmp_path / 'own.py'
  config.write_text(f'def get_config():\n  {line}\n')
  assert_one_line_error(cli(config=str(config)), message)


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize('folder', ['', './', 'link/'])
def test_a_mistake_that_a_library_finds_is_named_by_the_config_s_line(
    monkeypatch, tmp_path, folder
):
  (tmp_path / 'link').symlink_to(tmp_path)
  (tmp_path / 'own.py').write_text(
      "import os\ndef get_config():\n  os.environ['no such']\n"
  )
  monkeypatch.chdir(tmp_path)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  parser = command_line._WithNamedParts(values['config'].parser)
  with pytest.raises(app.UsageError, match=r"own.py, line 3: KeyError: 'no "):
    parser.parse(f'{folder}own.py')


# Prints what a run would be given.
SHOW = """
from dppo_jax import command_line
def show(config, _):
  print(config.to_json())
  return True
command_line.run(show)
"""


@pytest.mark.slow
@pytest.mark.parametrize('config, options, expected', [
    # Not the 0.15 of the config's own divergence, binary_tv.
    ('tv_binary.py', {'divergence.name': 'binary_kl'},
     {'name': 'binary_kl', 'threshold': 0.05}),
    # Which has no `construction`, and no `k`.
    ('tv_topk.py',
     {'divergence.name': 'binary_kl', 'divergence.threshold': 0.1},
     {'name': 'binary_kl', 'threshold': 0.1}),
    # A name that is the config's own changes nothing.
    ('grpo_clip_higher.py', {'divergence.name': 'ratio_gap'},
     {'name': 'ratio_gap', 'threshold_low': 0.2, 'threshold_high': 0.28}),
    ('tv_topk.py', {'algorithm': 'grpo_clip_higher',
                    'divergence.name': 'ratio_gap'},
     {'name': 'ratio_gap', 'threshold_low': 0.2, 'threshold_high': 0.28}),
], ids=['threshold', 'options', 'same', 'row'])
def test_a_name_brings_its_own_options(cli, config, options, expected):
  done = cli('-c', SHOW, config=config, **options)
  assert done.returncode == 0, done.stderr[-3000:]
  divergence = json.loads(done.stdout)['divergence']
  assert expected.items() <= divergence.items()
  assert divergences.build(**divergence).threshold  # No other's options.


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    # The config has neither part.
    {'shaping.name': 'overlong', 'shaping.buffer': 30},
    {'divergence.name': 'topk_kl', 'divergence.k': 5,
     'shaping.name': 'overlong', 'shaping.penalty': 0.5},
    {'task.name': 'jsonl', 'task.train_path': 'train.jsonl'},
    {'algorithm': 'cppo', 'trust_region.budget': 0.5},
], ids=['shaping', 'two', 'task', 'row'])
def test_options_that_only_a_name_brings_are_flags(cli, options):
  done = cli('-c', SHOW, config='tv_binary.py', **options)
  assert done.returncode == 0, done.stderr[-3000:]
  config = json.loads(done.stdout)
  for name, value in options.items():
    section, _, option = name.rpartition('.')
    assert (config[section] if section else config)[option] == value


@pytest.mark.slow
def test_a_setting_without_its_prefix_and_half_a_number_are_refused(cli):
  done = cli('-c', SHOW, '--seed=3')
  assert_one_line_error(done, "Unknown command line flag 'seed'. Settings of a "
                        'config are --config.seed=VALUE')
  done = cli('-c', SHOW, **{'learner.num_minibatches': 4.5})
  assert_one_line_error(done, 'config.learner.num_minibatches=4.5 must be a '
                        'whole number')


@pytest.mark.slow
def test_a_missing_config_flag_is_named(cli):
  done = subprocess.run(
      [sys.executable, '-m', 'dppo_jax.main'], cwd=ROOT, capture_output=True,
      text=True, check=False,
  )
  assert_one_line_error(done, '--config')


@pytest.mark.slow
@pytest.mark.parametrize('module, own', [
    ('main', []), ('evaluate', []), ('plan', ['topology']),
])
def test_help_lists_the_flags_of_a_command(cli, module, own):
  done = cli('-m', f'dppo_jax.{module}', '--help')
  assert 'Traceback' not in done.stderr
  listed = re.findall(r'^  --(\w+):', done.stdout, re.MULTILINE)
  assert {'config', 'workdir', 'num_processes', *own} <= set(listed)


@pytest.mark.slow
def test_evaluating_a_directory_without_a_run_is_refused(cli, tmp_path):
  done = cli('-m', 'dppo_jax.evaluate', workdir=tmp_path / 'nothing')
  assert_one_line_error(done, 'no run was saved there. Leave out --workdir')


# In this process.


def test_only_a_second_ctrl_c_interrupts_and_the_handlers_come_back():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with command_line.stop_on_signals() as stop:
    assert not stop.after(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.after(2)
    os.kill(os.getpid(), signal.SIGTERM)  # Once more, for nothing.
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      signal.sigtimedwait([], 0)  # Lets the handler run.
  assert before == (
      signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  )


def test_of_several_processes_a_second_ctrl_c_ends_this_one_at_once(
    monkeypatch
):
  got = []
  before = signal.signal(signal.SIGTERM, lambda *_: got.append('SIGTERM'))
  monkeypatch.setattr(command_line.jax, 'process_count', lambda: 2)
  try:
    with command_line.stop_on_signals():
      os.kill(os.getpid(), signal.SIGINT)
      signal.sigtimedwait([], 0)  # Lets the handler run.
      assert got == ['SIGTERM']  # Of which JAX tells the others.
      # Nothing of Python's, which would wait for the others at its exit.
      assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGTERM, before)
