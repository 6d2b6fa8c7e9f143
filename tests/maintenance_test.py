"""A notice of the cloud ends a run as a signal does."""

import contextlib
import http.server
import signal
import threading
import time

import pytest

from dppo_jax import maintenance


@pytest.fixture
def server():
  """A metadata server: what it says is in `says`, what it was asked `asked`."""

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      key = self.path.rpartition('/')[2]
      self.server.asked.append((self.path, self.headers['Metadata-Flavor']))
      self.send_response(200 if key in self.server.says else 404)
      self.end_headers()
      self.wfile.write(self.server.says.get(key, '').encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
    server.says, server.asked = {}, []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture
def google(tmp_path):
  product = tmp_path / 'product_name'
  product.write_text('Google Compute Engine\n')
  return product


@contextlib.contextmanager
def signals():
  """Those that arrive, instead of ending this process."""
  got = []
  before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
  try:
    yield got
  finally:
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize('says, expected', [
    ({'maintenance-event': 'NONE', 'preempted': 'FALSE'}, ''),
    # Such a machine is moved while it runs.
    ({'maintenance-event': 'MIGRATE_ON_HOST_MAINTENANCE'}, ''),
    ({'maintenance-event': 'TERMINATE_ON_HOST_MAINTENANCE'},
     'maintenance-event is TERMINATE_ON_HOST_MAINTENANCE'),
    ({'maintenance-event': 'NONE', 'preempted': 'TRUE\n'}, 'preempted is TRUE'),
    ({}, ''),
])
def test_only_the_end_of_a_machine_is_a_notice(server, says, expected):
  server.says = says
  assert maintenance.notice(server.url) == expected
  # It refuses a request without this header.
  assert server.asked[0] == (
      '/computeMetadata/v1/instance/maintenance-event', 'Google'
  )


def test_a_server_that_does_not_answer_is_no_notice():
  assert maintenance.notice('http://127.0.0.1:1') == ''


def test_a_notice_is_one_sigterm(server, google):
  with signals() as got, maintenance.watched(
      server=server.url, every_s=0.01, product=google
  ):
    deadline = time.monotonic() + 60
    while len(server.asked) < 4 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert not got
    server.says = {'preempted': 'TRUE'}
    while not got and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.1)
    assert got == [signal.SIGTERM]


def test_other_machines_ask_nobody(server, tmp_path):
  server.says = {'preempted': 'TRUE'}
  with signals() as got, maintenance.watched(
      server=server.url, every_s=0.01, product=tmp_path / 'nothing'
  ):
    time.sleep(0.1)
  assert not got and not server.asked
