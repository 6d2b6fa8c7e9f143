"""Flags to a config, mistakes of the user's to one line, signals to a wish."""

from collections.abc import Callable, Iterator
import contextlib
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import traceback
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
from jax.experimental import multihost_utils
import ml_collections
from ml_collections import config_flags

from dppo_jax import advantages
from dppo_jax import algorithms
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import losses
from dppo_jax import maintenance
from dppo_jax import normalizers
from dppo_jax import optim
from dppo_jax import processes
from dppo_jax import shaping
from dppo_jax import tasks
from dppo_jax import trust_regions

_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file, for example configs/tv_topk.py. Its options are flags, '
    '--config.NAME=VALUE; configs/default.py lists them.',
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Directory of the run; runs/NAME_OF_CONFIG if not given, and -ALGORITHM '
    'behind it where a flag or :NAME says which. Without it, evaluate takes '
    'the model that the config names.',
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT of process 0, where several processes meet. Not needed on a TPU '
    'pod, under SLURM or Open MPI.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes',
    None,
    'How many there are; 1 does not look for others. With --coordinator.',
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Number of this process, from 0. With --coordinator.'
)
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
    'heartbeat_timeout_s',
    100,
    'After so many seconds without a sign of life a process is dead, and all '
    'others end.',
    lower_bound=1,
)

# Sections of a config whose options are those of what `name` says.
_NAMED = {
    'advantage': advantages,
    'divergence': divergences,
    'dual': duals,
    'loss': losses,
    'normalizer': normalizers,
    'optimizer': optim,
    'shaping': shaping,
    'task': tasks,
    'trust_region': trust_regions,
}

_WHICH = 'Which config? For example --config=configs/tv_topk.py.'

# What a shell reports for a process that SIGTERM ended: it did not finish.
EXIT_INTERRUPTED = 128 + signal.SIGTERM


class Stop:
  """Whether a signal has asked the run to end after its current step."""

  requested = False

  def after(self, step: int) -> bool:
    """Asked after every step; all processes get the same answer."""
    # JAX tells the others of a SIGTERM, and all of them a step to stop after.
    return self.requested or multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
  """SIGTERM and the first Ctrl-C save and stop; a second Ctrl-C kills.

  A second SIGTERM changes nothing: whoever sends two still wants it saved.

  A notice of the cloud that this machine goes away counts as SIGTERM. Of
  several processes one gets the signal and all of them stop.
  """
  stop = Stop()
  several = jax.process_count() > 1

  def request(number, _):
    logging.warning('Got %s: stopping.', signal.Signals(number).name)
    if number == signal.SIGINT:
      # Of several, nobody is left waiting for the others at the exit.
      again = signal.SIG_DFL if several else signal.default_int_handler
      signal.signal(number, again)
    if several:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      stop.requested = True

  # SIGTERM is JAX's where there are several: a handler here would replace it.
  numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, request) for number in numbers}
  try:
    with maintenance.watched():
      yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def run(body: Callable[[Any, str | None], bool]) -> None:
  """Runs `body(config, workdir)` and turns expected errors into one line."""

  def parse(argv):
    with _one_line_errors(Exception):
      _make_configs_importable(argv)
      return flags.FLAGS(argv)

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'Unexpected argument {argv[1]!r}.')
    with _one_line_errors(Exception):
      processes.initialize(
          coordinator=_COORDINATOR.value,
          num_processes=_NUM_PROCESSES.value,
          process_id=_PROCESS_ID.value,
          heartbeat_timeout_s=_HEARTBEAT_TIMEOUT_S.value,
      )
    if not processes.is_main() and logging.get_verbosity() == logging.INFO:
      logging.set_verbosity(logging.WARNING)
    # Others are bugs of ours and keep their trace.
    with _one_line_errors(
        ValueError, OSError, ImportError, FloatingPointError
    ):
      finished = body(_CONFIG.value, _WORKDIR.value)
    sys.exit(0 if finished else EXIT_INTERRUPTED)

  flags.mark_flag_as_required('config')
  # Else --help would show those alone that the started module defines itself.
  for flag in flags.FLAGS.get_key_flags_for_module(__name__):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  # Absl turns every library's chatter on; only warnings of others are news.
  for name in ('jax', 'orbax', 'tensorflow_datasets'):
    python_logging.getLogger(name).setLevel(python_logging.WARNING)
  app.run(main, flags_parser=parse)


def _make_configs_importable(argv: list[str]) -> None:
  """Config files import `configs.default`, wherever the program is started."""
  given = [value for name, value in _given(argv) if name == 'config']
  for value in given:
    if not value:
      raise ValueError(_WHICH)
    path = pathlib.Path(value.partition(':')[0]).resolve()
    if not path.is_file():
      raise FileNotFoundError(
          f'There is no file {str(path)!r}. Configs are in configs/, which the '
          'checkout has and an installed package has not.'
      )
    folders = path.parent, *path.parent.parents
    roots = [x.parent for x in folders if x.name == 'configs']
    # experiments/small/config.py is of a checkout, and not in its configs/.
    roots += [x for x in folders if (x / 'configs' / 'default.py').is_file()]
    sys.path.append(str((roots or [path.parent.parent])[0]))
  if len(given) > 1:
    raise ValueError(f'--config is given {len(given)} times: {given}.')


class _WithNamedParts(flags.ArgumentParser):
  """Reads a config file; flags that name parts bring the parts' options.

  --config.algorithm=NAME takes the row NAME, --config.divergence.name=NAME the
  options and defaults of that divergence: those of another would be refused, or
  be what nobody asked for, as its threshold. It happens before other flags are
  looked at, so that these options are flags, too.
  """

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser

  def parse(self, argument: str) -> Any:
    try:
      config = self._parser.parse(argument)
    except ModuleNotFoundError as error:
      if error.name != 'configs':
        raise
      raise app.UsageError(
          f'{argument} imports `configs`, a folder of the checkout, and lies '
          'outside: start in the checkout.'
      ) from error
    # Mistakes of the file's own.
    except (AttributeError, LookupError, NameError) as error:
      raise app.UsageError(_with_place(error, argument)) from error
    if not isinstance(config, ml_collections.ConfigDict):
      raise app.UsageError(
          f'get_config() of {argument} returns a {type(config).__name__} and '
          'no ConfigDict; start from configs.default.get_config().'
      )
    asked = dict(_given(sys.argv))
    parts = {}
    try:
      if 'config.algorithm' in asked:
        parts = dict(algorithms.config(asked['config.algorithm']))
      for section, registry in _NAMED.items():
        name = asked.get(f'config.{section}.name')
        if name and name != parts.get(section, config[section])['name']:
          parts[section] = registry.config(name)
    except ValueError as error:  # Absl would put the flag's name before it.
      raise app.UsageError(str(error)) from error
    with config.unlocked():
      for name, value in parts.items():
        config[name] = value
    config.lock()
    return config


def _with_place(error: Exception, config: str) -> str:
  """The error, behind the line of the config file that made it."""
  path = pathlib.Path(config.partition(':')[0]).resolve()
  frames = traceback.extract_tb(error.__traceback__)
  own = [x for x in frames if pathlib.Path(x.filename).resolve() == path]
  *_, place = own or frames
  return (
      f'{place.filename}, line {place.lineno}: {type(error).__name__}: {error}'
  )


flags.FLAGS['config'].parser = _WithNamedParts(flags.FLAGS['config'].parser)


def _given(argv: list[str]) -> Iterator[tuple[str, str]]:
  """NAME and VALUE of each `--NAME=VALUE` or `--NAME VALUE`."""
  argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  for argument, following in zip(argv, [*argv[1:], '']):
    if argument.startswith('-'):
      name, equals, value = argument.lstrip('-').partition('=')
      yield name, value if equals else following


@contextlib.contextmanager
def _one_line_errors(*expected: type[Exception]) -> Iterator[None]:
  """A mistake of the user's ends the program without a stack trace.

  `--verbosity=1` brings the trace back.
  """
  try:
    yield
  except expected as error:
    if flags.FLAGS.is_parsed() and flags.FLAGS.verbosity > 0:
      raise
    print(f'error: {_one_line(error)}', file=sys.stderr)
    sys.exit(2)


def _one_line(error: Exception) -> str:
  """The message on one line, without what the flag library wraps it in."""
  # A KeyError shows its message as a quoted string.
  message = str(error.args[0] if isinstance(error, KeyError) else error)
  if 'Traceback' in message:  # A config file raised: its last line says what.
    # The flag library shows it as a quoted string.
    message = message.replace('\\n', '\n').strip().splitlines()[-1]
    message = re.sub(r'^(\w+\.)*\w*Error: ', '', message)
  message = ' '.join(message.split())
  if typo := re.search(r'Did you mean "(.*)" instead of "(.*?)"', message):
    return f'Unknown config field {typo[2]!r}. Did you mean {typo[1]!r}?'
  if re.fullmatch(r'\W*\w+\W*', message):
    name = re.sub(r'\W', '', message)
    given = [x.lstrip('-').partition('=')[0] for x in sys.argv[1:]]
    [name, *_] = [
        x.removeprefix('config.') for x in given
        if x.startswith('config.') and x.endswith(f'.{name}')
    ] or [name]
    return (
        f'Unknown config field {name!r}. configs/default.py lists them all; '
        'options of another algorithm or task come with a config that has it, '
        'configs/default.py:NAME or configs/jsonl.py.'
    )
  if unknown := re.search(r'Key "(.*?)" does not exist', message):
    return f'Unknown config field {unknown[1]!r} for this algorithm or task.'
  if 'get_config() takes 0 positional arguments' in message:
    return (
        'This config takes no :NAME behind its path; use '
        'configs/default.py:NAME, or --config.algorithm=NAME.'
    )
  if whole := re.search(
      r'flag --config\.([\w.]+)=(\S+): Failed to parse .* as a ConfigDict',
      message,
  ):
    return (
        f'config.{whole[1]} holds several options and is not {whole[2]!r}; use '
        f'--config.{whole[1]}.name={whole[2]}, or a config that has it.'
    )
  if unknown := re.match(
      r"Unknown command line flag '(\w+\.)?(\S+)'$", message
  ):
    return f'{message}. Settings of a config are --config.{unknown[2]}=VALUE.'
  if number := re.search(
      r'flag --config\.([\w.]+)=(.*): invalid literal for int', message
  ):
    return f'config.{number[1]}={number[2]} must be a whole number.'
  if '--config must have a value' in message:
    return _WHICH
  return message


def default_workdir() -> str:
  """runs/tv_topk for --config=configs/tv_topk.py.

  runs/default-grpo for configs/default.py:grpo, and runs/tv_topk-grpo where
  --config.algorithm=grpo is beside it: that is no run of tv_topk.
  """
  filename = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, argument = filename.partition(':')
  changed = config_flags.get_override_values(flags.FLAGS['config'])
  name = changed.get('algorithm') or argument
  stem = pathlib.Path(path).stem
  return str(pathlib.Path('runs', f'{stem}-{name}' if name else stem))
