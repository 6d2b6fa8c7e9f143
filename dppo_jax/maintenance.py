"""Notices of Google's cloud that a machine goes away, taken for a SIGTERM.

A virtual machine is told by its metadata server: `maintenance-event` says
TERMINATE_ON_HOST_MAINTENANCE some time before it is stopped (machines with a
GPU or TPU cannot be moved), `preempted` says TRUE when a spot machine is taken.
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
Elsewhere nobody is asked and no thread runs: schedulers send SIGTERM.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import signal
import threading
import urllib.request

from absl import logging

# Key of the metadata server -> what it says when the machine goes away.
_NOTICES = {
    'maintenance-event': 'TERMINATE_ON_HOST_MAINTENANCE',
    'preempted': 'TRUE',
}
_EVERY_S = 5.0  # A spot machine has 30 seconds.
_TIMEOUT_S = 2.0
_SERVER = 'http://metadata.google.internal'
_PRODUCT = pathlib.Path('/sys/class/dmi/id/product_name')


@contextlib.contextmanager
def watched(
    *,
    server: str = _SERVER,
    every_s: float = _EVERY_S,
    product: pathlib.Path = _PRODUCT,
) -> Iterator[None]:
  """Sends this process a SIGTERM, once, when a notice comes.

  Args:
    server: of the metadata.
    every_s: how often it is asked, in seconds.
    product: the file that names the machine's maker.
  """
  if not _is_of_google(product):
    yield
    return
  ended = threading.Event()

  def watch():
    while not ended.wait(every_s):
      if said := notice(server):
        logging.warning('This machine goes away: %s.', said)
        os.kill(os.getpid(), signal.SIGTERM)
        return

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def notice(server: str = _SERVER) -> str:
  """What the server says of the end of this machine; '' for nothing."""
  for key, meaning in _NOTICES.items():
    request = urllib.request.Request(
        f'{server}/computeMetadata/v1/instance/{key}',
        headers={'Metadata-Flavor': 'Google'},
    )
    try:
      with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        said = answer.read().decode().strip()
    except OSError:  # Busy, or without this key: asked again.
      continue
    if said == meaning:
      return f'{key} is {said}'
  return ''


def _is_of_google(product: pathlib.Path) -> bool:
  try:
    return product.read_text().startswith('Google')
  except OSError:
    return False
