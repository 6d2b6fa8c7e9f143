"""Every launcher runs the same line, and what was interrupted goes on.

Nothing is launched: `gcloud`, `xpk`, `srun`, `scontrol` and `python` are small
programs on the PATH that write down how they were called.
"""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dppo_jax import command_line

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'experiments' / 'launch'
SKY = yaml.safe_load((LAUNCH / 'sky.yaml').read_text())

FLAGS = [
    '--config=configs/tv_topk.py',
    '--workdir=/runs/tv_topk',
    # Must come through every shell in between.
    "--config.learning_rates=(('embed', 0.0),)",
]
MAIN = ['python', '-m', 'dppo_jax.main', *FLAGS]
PLACE = {
    'CLUSTER': 'my-cluster',
    'EXTRAS': 'tpu',
    'SECONDS_BETWEEN': '0',
    'SHARE': '10.0.0.2:/runs',
    'SLURM_JOB_ID': '7',
    'SOURCE': 'https://host/owner/dppo_jax',
    'TPU': 'my-run',
    'TYPE': 'v5p-128',
    'WORKLOAD': 'my-run',
    'ZONE': 'us-east5-a',
}
SKY_NODE = SKY['envs'] | {
    'FLAGS': shlex.join(FLAGS),
    'SKYPILOT_NODE_IPS': '10.0.0.5',
    'SKYPILOT_NODE_RANK': '0',
    'SKYPILOT_NUM_NODES': '1',
}
# Says what is in `codes`, a line for each call, then 0.
STUB = """#!{python}
import json, pathlib, sys
here = pathlib.Path({folder!r})
call = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(here / 'calls', 'a') as file:
  file.write(json.dumps(call) + '\\n')
{body}
"""
# The request for a slice is in `state`; what it answers on a lost host, too.
GCLOUD = """
verb, state = call[4], here / 'state'
if verb == 'create':
  state.write_text('ACTIVE')
elif verb == 'delete':
  state.unlink()
elif verb == 'describe':
  print(state.read_text()) if state.exists() else sys.exit(1)
elif 'dppo_jax.main --config' in call[-1]:
  answers = (here / 'answers').read_text().split()
  (here / 'answers').write_text(' '.join(answers[1:]))
  code, _, after = answers[0].partition(':')
  if after:
    state.write_text(after)
  sys.exit(int(code))
"""
ANSWER = """
sys.exit(int((here / 'answers').read_text()))
"""


class Machine:
  """A folder of programs that only write down how they were called."""

  def __init__(self, folder):
    self.folder = folder
    self.bin = folder / 'bin'
    self.bin.mkdir()
    for name, body in (
        ('gcloud', GCLOUD), ('srun', ANSWER), ('python', ANSWER),
        ('scontrol', ''), ('xpk', ''),
    ):
      self.program(name, body)

  def program(self, name, body):
    path = self.bin / name
    path.write_text(STUB.format(
        python=sys.executable, folder=str(self.folder), body=body
    ))
    path.chmod(0o755)

  def start(self, command, *, answers='0', **environment):
    (self.folder / 'answers').write_text(answers)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={'PATH': f'{self.bin}:{os.environ["PATH"]}'} | PLACE | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

  def run(self, command, **options):
    """(exit code, what was printed, what was complained about)."""
    process = self.start(command, **options)
    printed, complaints = process.communicate(timeout=600)
    return process.returncode, printed, complaints

  def calls(self, program=''):
    path = self.folder / 'calls'
    lines = path.read_text().splitlines() if path.exists() else []
    calls = [json.loads(line) for line in lines]
    return [call for call in calls if program in ('', call[0])]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def script(name, *flags):
  return ['bash', f'experiments/launch/{name}', *flags]


def sky(block='run'):
  return ['bash', '-c', SKY[block]]


SCRIPTS = ('tpu_vm.sh', 'slurm.sbatch', 'xpk.sh')


def command_of(call):
  [command] = [x for x in call if x.startswith('--command=')]
  return command.removeprefix('--command=')


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('*.s*')), ids=str)
def test_bash_parses(path):
  subprocess.run(['bash', '-n', path], check=True)


def test_bash_parses_what_sky_runs():
  for block in ('setup', 'run'):
    subprocess.run(['bash', '-nc', SKY[block]], check=True)


def test_bash_parses_what_is_sent_to_hosts_and_pods(machine):
  for name in ('tpu_vm.sh', 'xpk.sh'):
    assert machine.run(script(name, *FLAGS))[0] == 0
  sent = [
      command_of(call) for call in machine.calls()
      if any(word.startswith('--command=') for word in call)
  ]
  assert len(sent) == 3  # Preparing a host, running on it, running in a pod.
  for command in sent:
    subprocess.run(['bash', '-nc', command], check=True)


def test_the_scripts_know_the_exit_code_of_an_interrupted_run():
  code = command_line.EXIT_INTERRUPTED
  assert f'INTERRUPTED={code}\n' in (LAUNCH / 'common.sh').read_text()
  assert SKY['resources']['job_recovery']['recover_on_exit_codes'] == [code]


def test_every_launcher_runs_the_same_line(machine):
  for name in SCRIPTS:
    code, _, complaints = machine.run(script(name, *FLAGS))
    assert code == 0, complaints
  assert machine.run(sky(), **SKY_NODE)[0] == 0

  on_hosts = [x for x in machine.calls('gcloud') if 'ssh' in x][-1]
  assert '--worker=all' in on_hosts
  assert shlex.split(command_of(on_hosts))[-len(MAIN):] == MAIN
  [step] = machine.calls('srun')
  assert step[-len(MAIN):] == MAIN
  [workload] = machine.calls('xpk')
  assert shlex.split(command_of(workload))[-len(MAIN):] == MAIN
  assert machine.calls('python') == [MAIN]


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_dry_run_prints_the_line_and_does_nothing(machine, name):
  simple = FLAGS[:2]
  code, printed, _ = machine.run(script(name, *simple), DRY_RUN='1')
  assert code == 0
  assert shlex.join(['python', '-m', 'dppo_jax.main', *simple]) in printed
  assert not machine.calls()


def test_a_dry_run_of_sky_prints_the_line_and_does_nothing(machine):
  code, printed, _ = machine.run(sky(), **SKY_NODE | {'DRY_RUN': '1'})
  assert (code, shlex.split(printed)) == (0, MAIN)
  assert not machine.calls()


@pytest.mark.parametrize('name', SCRIPTS)
@pytest.mark.parametrize('flags, complaint', [
    (FLAGS[1:], '--config='),
    (FLAGS[:1], '--workdir='),
    ([FLAGS[0], '--workdir=gs://bucket/run'], 'gs://bucket/run is a URL'),
])
def test_what_cannot_work_is_refused_before_anything_starts(
    machine, name, flags, complaint
):
  code, _, complaints = machine.run(script(name, *flags))
  assert code == 2
  assert complaint in complaints and len(complaints.splitlines()) == 1
  assert not machine.calls()


def test_a_setting_that_is_missing_is_named(machine):
  code, _, complaints = machine.run(script('xpk.sh', *FLAGS), CLUSTER='')
  assert (code, complaints.split()[1]) == (2, 'CLUSTER')


@pytest.mark.parametrize('answers, code, starts', [
    ('0', 0, 1),
    ('2 0', 2, 1),  # A mistake in the flags: another start would repeat it.
    ('1 0', 1, 1),
    ('134 0', 134, 1),  # A process has died, all machines are there.
    ('143 0', 0, 2),
    ('143 143 2 0', 2, 3),
])
def test_on_a_tpu_only_an_interrupted_run_starts_again(
    machine, answers, code, starts
):
  assert machine.run(script('tpu_vm.sh', *FLAGS), answers=answers)[0] == code
  commands = [command_of(x) for x in machine.calls('gcloud') if 'ssh' in x]
  assert sum('-m dppo_jax.main' in x for x in commands) == starts
  assert len(commands) == 2 * starts  # Each is prepared first.
  assert sum('create' in x for x in machine.calls('gcloud')) == 1


def test_a_preempted_slice_is_made_again(machine):
  # ssh says 255 when the host is gone.
  code, *_ = machine.run(
      script('tpu_vm.sh', *FLAGS), answers='255:SUSPENDED 0', SPOT='1'
  )
  assert code == 0
  verbs = [x[4] for x in machine.calls('gcloud')]
  assert [x for x in verbs if x != 'describe'] == [
      'create', 'ssh', 'ssh', 'delete', 'create', 'ssh', 'ssh'
  ]
  assert all('--spot' in x for x in machine.calls('gcloud') if x[4] == 'create')


@pytest.mark.parametrize('answer, requeues', [
    (0, 0), (2, 0), (1, 0), (134, 0), (143, 1)
])
def test_on_slurm_only_an_interrupted_run_is_requeued(
    machine, answer, requeues
):
  code, *_ = machine.run(script('slurm.sbatch', *FLAGS), answers=str(answer))
  assert code == answer
  assert machine.calls('scontrol') == [['scontrol', 'requeue', '7']] * requeues


# Writes down that it started; ends with 143 a while after the first SIGTERM.
WAITS_FOR_A_SIGNAL = """
import os, signal, time
def stop(*_):
  with open(here / 'signals', 'a') as file:
    file.write('x')
signal.signal(signal.SIGTERM, stop)
(here / 'started').write_text('')
deadline = time.monotonic() + 60
while not (here / 'signals').exists() and time.monotonic() < deadline:
  time.sleep(0.02)
time.sleep(0.5)
sys.exit(143)
"""


def wait_for(path):
  deadline = time.monotonic() + 600
  while not path.exists():
    assert time.monotonic() < deadline, f'{path} never came'
    time.sleep(0.02)


def test_slurm_tells_the_processes_once_and_waits_until_they_have_saved(
    machine, tmp_path
):
  machine.program('srun', WAITS_FOR_A_SIGNAL)
  process = machine.start(script('slurm.sbatch', *FLAGS))
  wait_for(tmp_path / 'started')
  process.send_signal(signal.SIGTERM)
  wait_for(tmp_path / 'signals')
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=600)
  assert process.returncode == 143
  assert (tmp_path / 'signals').read_text() == 'x'
  assert machine.calls('scontrol') == [['scontrol', 'requeue', '7']]


def test_on_gke_the_signal_reaches_python(machine, tmp_path):
  machine.run(script('xpk.sh', *FLAGS))
  [workload] = machine.calls('xpk')
  [restarts] = [x for x in workload if x.startswith('--max-restarts=')]
  assert int(restarts.partition('=')[2]) > 0
  machine.program('python', WAITS_FOR_A_SIGNAL)
  machine.program('pip', '')
  # XPK starts the command so, and passes on what Kubernetes sends.
  container = f'({command_of(workload)}) & echo $!; wait $!; exit $?'
  process = machine.start(['bash', '-c', container])
  wait_for(tmp_path / 'started')
  os.kill(int(process.stdout.readline()), signal.SIGTERM)
  process.communicate(timeout=600)
  assert (tmp_path / 'signals').exists()
  assert process.returncode == 143


def test_sky_ends_with_the_exit_code_of_the_run(machine):
  for answer in (0, 2, 143):
    assert machine.run(sky(), answers=str(answer), **SKY_NODE)[0] == answer


def test_sky_tells_each_of_several_nodes_where_the_first_is(machine):
  nodes = SKY_NODE | {
      # More than a pipe holds: who wrote them to one would meet its end.
      'SKYPILOT_NODE_IPS': '\n'.join(['10.0.0.5', *(10_000 * ['10.0.0.6'])]),
      'SKYPILOT_NODE_RANK': '1',
      'SKYPILOT_NUM_NODES': '10001',
  }
  assert machine.run(sky(), **nodes)[0] == 0
  assert machine.calls('python') == [[
      *MAIN, '--coordinator=10.0.0.5:8476', '--num_processes=10001',
      '--process_id=1',
  ]]
