"""A signal is heeded whatever the code that it interrupts was doing, and however many come."""

import json
import subprocess
import sys
import threading

from humanline.training._stop_request import StopRequest

SCRIPT = '''
import json, os, signal, socket, sys, time
from humanline.rollout import Stopped
from humanline.rollout._connection import Connection
from humanline.training._stop_request import StopRequest

SECONDS = 40
PLACES = (1, 2, 3, 4, 5, 6, 10, 25)


def wait_for_a_server(place, count):
    """Waits for a server that is not there; from the given line of the waiting on, each line is met by a signal."""
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        server = Connection(url, {}, timeout=60, retries=1_000_000, wait=None, introduce=lambda: None)
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code.co_name.startswith("_note"):
                return None
            if not frame.f_code.co_filename.endswith(("_connection.py", "threading.py")):
                return None
            if event == "line":
                lines += 1
                if place <= lines < place + count:
                    os.kill(os.getpid(), signal.SIGTERM)
            return trace

        with StopRequest(server.stop) as request:
            sys.settrace(trace)
            try:
                server.start()
                server.persist(server.greet)
            except Stopped:
                pass
            finally:
                sys.settrace(None)
        return request.signal == "SIGTERM"


children = {}
for place in PLACES:
    for count in (1, 300):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if wait_for_a_server(place, count) else 1)
        children[pid] = (place, count)

wrong = []
deadline = time.monotonic() + SECONDS
while children and time.monotonic() < deadline:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid == 0:
        time.sleep(0.05)
    elif status != 0:
        wrong.append(children.pop(pid))
    else:
        children.pop(pid)
for pid in children:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
print(json.dumps({"wrong": sorted(wrong), "hang": sorted(children.values())}))
'''


def test_a_signal_at_any_line_of_a_wait_ends_it():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"wrong": [], "hang": []}


def test_the_thread_that_asks_the_store_ends_with_the_block():
    """One that is in the store's code while the interpreter ends would abort the process."""
    before = threading.enumerate()
    with StopRequest(lambda: None):
        assert len(threading.enumerate()) == len(before) + 1
    assert threading.enumerate() == before
