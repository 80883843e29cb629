"""Requests to a server with OpenAI's API: failed requests are retried, and all wait while the server is down."""

import http.client
import itertools
import json
import logging
import multiprocessing
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

from humanline.errors import Stopped, TrainingError

log = logging.getLogger(__name__)
T = TypeVar("T")

_NO_SERVER = (502, 503, 504)  # a proxy's codes when the server behind it is down
_POLL_SECONDS = 10.0
_SECONDS_BETWEEN_LOOKS = 0.5  # how often a waiting thread checks whether to stop


class Gone(Exception):
    """The server did not answer, or closed the connection; ``busy``: it is up but overloaded (HTTP 503)."""

    def __init__(self, message: str, busy: bool = False) -> None:
        super().__init__(message)
        self.busy = busy


class Refused(Exception):
    """The server answered with an error, or with a reply that does not match the request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.passes = status in (408, 409, 425, 429) or status >= 500  # a retry may succeed


class Connection:
    """Sends the requests of many threads to one server.

    Args:
        url (str): the API's base URL; a request to ``/models`` under it shows whether the server is up.
        headers (dict[str, str]): HTTP headers of every request.
        timeout (float): seconds after which a request without an answer fails.
        retries (int): the maximum number of retries of a failed request.
        wait (float | None): seconds to wait for a server that is down; None waits without limit.
        introduce (Callable[[], None]): prepares a server that may have restarted, such as by announcing weights.
    """

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        *,
        timeout: float,
        retries: int,
        wait: float | None,
        introduce: Callable[[], None],
    ) -> None:
        self._url, self._headers, self._introduce = url, headers, introduce
        self._timeout, self._retries, self._wait = timeout, retries, wait
        self._gate = threading.Lock()  # held while the server is down
        self._outages = 0
        # Plain flags need no lock; waiting threads check them twice a second.
        self._given_up = False
        self._stopped = False  # permanent
        self.is_introduced = True

    def start(self) -> None:
        """Lets requests wait again after :meth:`give_up`; it does not undo :meth:`stop`."""
        self._given_up = False

    def give_up(self) -> None:
        """Ends all current waits: the waiting threads raise :class:`Stopped`."""
        self._given_up = True

    def stop(self) -> None:
        """Ends all waits permanently."""
        self._stopped = True

    def check(self) -> None:
        """Raises :class:`Stopped` after :meth:`give_up` or :meth:`stop`."""
        if self._stopped or self._given_up:
            raise Stopped("sampling was stopped")

    def heeding(self, call: Callable[[], T]) -> T:
        """Returns the result of a slow call. The call runs in a daemon thread, so that waiting for it can be ended.

        Raises:
            Stopped: if waiting is ended first.
        """
        pool = ThreadPool(1)
        try:
            result: T = self.next_of(pool.imap(lambda _: call(), [None]))
            return result
        finally:
            pool.terminate()

    def next_of(self, results: Any) -> Any:
        """Returns the next result of a pool's ``imap``.

        Raises:
            Stopped: if waiting is ended first.
        """
        while True:
            try:
                return results.next(timeout=_SECONDS_BETWEEN_LOOKS)
            except multiprocessing.TimeoutError:
                self.check()

    def persist(self, attempt: Callable[[], T]) -> T:
        """Sends a request until it succeeds, its retries are used up, or a retry cannot help.

        Raises:
            Refused: if the last reply is an error, or does not match the request.
            Stopped: if waiting is ended first.
            TrainingError: if the server stays down, or is lost at every retry.
        """
        for tries in itertools.count():
            self.check()
            try:
                with self._gate:
                    outages = self._outages
                    if not self.is_introduced:
                        self._introduce()
                        self.is_introduced = True
                return attempt()
            except Refused as error:
                if tries == self._retries or not error.passes:
                    raise
                self._pause(tries)
            except Gone as gone:
                if tries == self._retries:
                    raise TrainingError(
                        f"{self._url}: one request failed {tries + 1} times ({gone}); check the server"
                    ) from None
                if not self._was_away(outages, gone.busy):
                    self._pause(tries)
        raise AssertionError("unreachable")

    def _was_away(self, outages: int, busy: bool) -> bool:
        """Waits until the server is up; returns whether it was down now, or has been since there were ``outages``.

        One thread polls and the others wait. A server that is up at once may have restarted, unless it was ``busy``.
        """
        with self._gate:
            self.check()
            if self._outages != outages:  # another thread has handled this outage
                return True
            deadline = None if self._wait is None else time.monotonic() + self._wait
            for tries in itertools.count():
                try:
                    self.greet(_POLL_SECONDS)
                    break
                except Gone as gone:
                    if tries == 0:
                        log.warning(
                            f"{self._url} is down ({gone}); finished requests are kept, and the others resume when it "
                            "is back"
                        )
                    if deadline is not None and time.monotonic() >= deadline:
                        raise TrainingError(f"{self._url} has been down for {self._wait:g} s; restart it") from None
                    self._pause(min(tries, 4))
            if tries == 0 and busy:
                return False
            self._outages += 1
            self.is_introduced = False
            if tries > 0:
                log.warning(f"{self._url} is back")
            return tries > 0

    def _pause(self, tries: int) -> None:
        """Waits with exponential back-off, randomised so that threads do not retry at the same time."""
        until = time.monotonic() + min(0.5 * 2 ** min(tries, 6), 30) * random.uniform(0.5, 1)
        while (rest := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(rest, _SECONDS_BETWEEN_LOOKS))
        self.check()

    def greet(self, timeout: float | None = None) -> None:
        """Raises :class:`Gone` if the server does not answer; any answer counts."""
        try:
            self.exchange(f"{self._url}/models", timeout=timeout)
        except Refused as error:
            if error.status == 408:
                raise Gone(str(error)) from None

    def exchange(self, url: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> bytes:
        """Sends one request, a POST if it has a body, and returns the body of the reply.

        Raises:
            Gone: if the server does not answer.
            Refused: if the server answers with an error.
        """
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)  # a redirect must not receive the API key
        seconds = timeout or self._timeout
        try:
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            if error.code in _NO_SERVER:
                raise Gone(f"HTTP {error.code}", busy=error.code == 503) from None
            path = urllib.parse.urlsplit(url).path
            raise Refused(error.code, f"HTTP {error.code} from {path}: {_message(error)}") from None
        except TimeoutError:
            raise Refused(408, f"no answer in {seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Gone(str(getattr(error, "reason", None) or error) or type(error).__name__) from None


def _message(error: urllib.error.HTTPError) -> str:
    """Returns a server's error text as one line of at most 300 characters."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return " ".join((text or error.reason).split())[:300]
