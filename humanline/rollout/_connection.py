"""A server with the API of OpenAI, which may fail: requests that are repeated, and waited with while it is gone."""

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

_NO_SERVER = (502, 503, 504)  # how a proxy says that there is none behind it
_POLL_SECONDS = 10.0
_SECONDS_BETWEEN_LOOKS = 0.5  # at whether waiting has ended


class Gone(Exception):
    """No server answered, or it went away while it did; or, ``busy``, one that is there had no time."""

    def __init__(self, message: str, busy: bool = False) -> None:
        super().__init__(message)
        self.busy = busy


class Refused(Exception):
    """The server answered otherwise than asked."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.passes = status in (408, 409, 425, 429) or status >= 500  # what another attempt may change


class Connection:
    """The requests of many threads to one server.

    Args:
        url (str): the API's address, whose ``/models`` is asked whether the server is there.
        headers (dict[str, str]): of every request.
        timeout (float): seconds after which a request without an answer has failed.
        retries (int): how often a request that failed, or was lost with its server, is repeated.
        wait (float | None): seconds to wait for a server that is gone; None waits for ever.
        introduce (Callable[[], None]): tells a server that has started anew what it has to know.
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
        self._gate = threading.Lock()  # closed while the server is gone
        self._outages = 0
        # Plain flags, which need no lock: who waits looks at them twice a second.
        self._given_up = False
        self._stopped = False  # never taken back
        self.is_introduced = True

    def start(self) -> None:
        """Lets requests wait again after :meth:`give_up`; after :meth:`stop` none does."""
        self._given_up = False

    def give_up(self) -> None:
        """Ends all waiting for the moment: those who wait raise :class:`Stopped`."""
        self._given_up = True

    def stop(self) -> None:
        """Ends all waiting for good."""
        self._stopped = True

    def check(self) -> None:
        """Raises :class:`Stopped` once waiting has ended."""
        if self._stopped or self._given_up:
            raise Stopped("sampling was stopped")

    def heeding(self, call: Callable[[], T]) -> T:
        """The result of a call that may take long in one request, made in a thread which ends with the process.

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
        """The next result of a pool's ``imap``, unless waiting is ended first.

        Raises:
            Stopped: if it is.
        """
        while True:
            try:
                return results.next(timeout=_SECONDS_BETWEEN_LOOKS)
            except multiprocessing.TimeoutError:
                self.check()

    def persist(self, attempt: Callable[[], T]) -> T:
        """Repeats a request until it is answered, its retries are spent, or the answer will not change.

        Raises:
            Refused: if the answer stays another than asked.
            TrainingError: if the server stays away, is lost again and again, or waiting has been stopped.
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
                    raise TrainingError(f"{self._url} failed {tries + 1} times at one request ({gone})") from None
                if not self._was_away(outages, gone.busy):
                    self._pause(tries)
        raise AssertionError("unreachable")

    def _was_away(self, outages: int, busy: bool) -> bool:
        """Whether the server is gone, or has been since there were ``outages``. Returns once it is back; one caller
        asks, the others wait. One that is there at once may yet have started anew, unless it was ``busy``."""
        with self._gate:
            self.check()
            if self._outages != outages:  # another has seen to it meanwhile
                return True
            deadline = None if self._wait is None else time.monotonic() + self._wait
            for tries in itertools.count():
                try:
                    self.greet(_POLL_SECONDS)
                    break
                except Gone as gone:
                    if tries == 0:
                        log.warning(
                            f"{self._url} is gone ({gone}); what is finished is kept, and the rest goes on when it is "
                            "back"
                        )
                    if deadline is not None and time.monotonic() >= deadline:
                        raise TrainingError(f"{self._url} has been gone for {self._wait:g} s; start it again") from None
                    self._pause(min(tries, 4))
            if tries == 0 and busy:
                return False
            self._outages += 1
            self.is_introduced = False
            if tries > 0:
                log.warning(f"{self._url} is back")
            return tries > 0

    def _pause(self, tries: int) -> None:
        """Exponential back-off, spread so that not all come back at once."""
        until = time.monotonic() + min(0.5 * 2 ** min(tries, 6), 30) * random.uniform(0.5, 1)
        while (rest := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(rest, _SECONDS_BETWEEN_LOOKS))
        self.check()

    def greet(self, timeout: float | None = None) -> None:
        """Raises :class:`Gone` if the server does not answer; any answer will do."""
        try:
            self.exchange(f"{self._url}/models", timeout=timeout)
        except Refused as error:
            if error.status == 408:
                raise Gone(str(error)) from None

    def exchange(self, url: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> bytes:
        """One request, with a body a POST; the answer's body.

        Raises:
            Gone: if no server answers.
            Refused: if it answers with an error.
        """
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)  # the key is for this server alone
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
    """What a server says of an error, in one line of moderate length."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return " ".join((text or error.reason).split())[:300]
