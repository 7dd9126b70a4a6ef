"""Flower's Grid, for the sites of one run only: named, with a quorum, and never waiting without an end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from clients.wire import WireError
from dermaflow.errors import FederationError

POLL, LONGEST_POLL = 0.1, 1.0
"""Seconds between two looks for answers; Flower's own loop sleeps three."""


def _said(reason: str | None) -> str | None:
    """What a site answered in place of a result; Flower puts an exception as ``<class 'a.b.C'>:<'text'>``."""
    found = re.fullmatch(r"<class '([\w.]+)'>:<'(.*)'>", reason or "", re.DOTALL)
    if found is None:
        return reason
    name = found[1].rpartition(".")[2]
    return found[2] if name == "Refused" else f"{name}: {found[2]}"


class SiteGrid(Grid):
    """A grid that knows the sites of the run.

    Args:
        grid: Flower's.
        names: Site of each node id; only these are asked, whoever else is online.
        quorum: Share of the answers after which only `grace` is waited.
        grace: Seconds.
        failed: Called with the names of the sites that failed or were late, and why.
        check: Raises WireError for an answer that cannot be, which is then as good as none.

    Attributes:
        answered: Sites whose answers are in what came last.
        images: Training images that each site described, by which its updates count; empty before they did.
    """

    def __init__(
        self, grid: Grid, names: dict[int, str], *, quorum: float = 1.0, grace: float = 5.0,
        failed: Callable[[dict[str, str]], None] = lambda reasons: None,
        check: Callable[[Message], None] = lambda answer: None,
    ) -> None:  # fmt: skip
        self._grid, self.names = grid, names
        self._quorum, self._grace, self._failed, self._check = quorum, grace, failed, check
        self.answered: list[str] = []
        self.images: dict[str, float] = {}

    def set_run(self, run: Run) -> None:
        """Not ours to change."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """The run of the grid beneath."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As the grid beneath."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """The run's sites that are online."""
        return [node for node in self._grid.get_node_ids() if node in self.names]

    def get_nodes(self) -> Iterable[Any]:
        """As the grid beneath."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid beneath."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid beneath."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, and wait for all answers, or for the quorum and the grace, or until the time is over.

        A site that failed, is late or sent what cannot be is named to `failed`; nothing of it is among the answers.
        """
        found, reasons = self.exchange(list(messages), timeout)
        answers = []
        for answer in found:
            try:
                self._check(answer)
                answers.append(answer)
            except WireError as error:
                reasons[self.names.get(answer.metadata.src_node_id, "?")] = f"refused: {error}"
        self.answered = [self.names.get(answer.metadata.src_node_id, "?") for answer in answers]
        if reasons:
            self._failed(reasons)
        return answers

    def check_images(self, site: str, figures: Mapping[str, float]) -> None:
        """Raise WireError if a site trained on other images than it described: an update counts by them."""
        found = figures.get("images")
        if found is None:
            raise WireError("the answer does not say how many images it counts for")
        most = max(self.images.values(), default=found)  # of a site that came later nothing better is known
        if found != self.images.get(site, min(found, most)):
            raise WireError(f"it counts {found:g} images", expected=f"{self.images.get(site, most):g}, as described")

    def exchange(self, messages: list[Message], timeout: float | None) -> tuple[list[Message], dict[str, str]]:
        """As `send_and_receive`, and gives the sites that failed or are late, and why."""
        if not messages:
            return [], {}
        ids = list(self._grid.push_messages(messages))
        site = {
            number: self.names.get(message.metadata.dst_node_id, "?")
            for number, message in zip(ids, messages, strict=True)
        }
        waiting, answers, reasons = set(ids), [], {}
        began, enough = time.monotonic(), None
        while waiting and (timeout is None or time.monotonic() - began < timeout):
            for reply in self._grid.pull_messages(waiting):
                number = reply.metadata.reply_to_message_id
                waiting.discard(number)
                if reply.has_error():
                    reasons[site[number]] = _said(reply.error.reason) or f"error {reply.error.code}"
                else:
                    answers.append(reply)
            if enough is None and len(answers) >= self._quorum * len(ids):
                enough = time.monotonic()
            if enough is not None and time.monotonic() - enough > self._grace:
                break
            if waiting:  # a question costs the hub some 6 ms: the longer it took, the less it matters to ask at once
                time.sleep(min(LONGEST_POLL, max(POLL, (time.monotonic() - began) / 10)))
        reasons |= {site[number]: "no answer in time" for number in waiting}
        return answers, reasons

    def wait(self, timeout: float, least: int) -> None:
        """Wait until every site is online, or until the time is over and enough are.

        A site that is not is named to `failed`; it takes part from when it comes.

        Args:
            timeout: Seconds.
            least: Sites to go on with.

        Raises:
            FederationError: Fewer are online after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while missing := set(self.names) - set(self._grid.get_node_ids()):
            if time.monotonic() > end:
                if len(self.names) - len(missing) >= least:
                    self._failed({self.names[node]: f"not online after {timeout:g} s" for node in missing})
                    return
                raise FederationError(
                    f"not online after {timeout:g} s: {', '.join(sorted(self.names[node] for node in missing))}",
                    expected=f"at least {least} sites of the run",
                    todo="start them (dermaflow site join), name fewer sites or lower quorum",
                )  # fmt: skip
            time.sleep(POLL)
