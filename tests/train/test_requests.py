"""What the first rank is asked besides by signals, without any process."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.train.orders import Asked, Orders, Request, orders_file
from orchestrator.train.requests import LOOK_S, Requests, stops_after
from orchestrator.train.signals import StopFlag


@pytest.mark.parametrize(
    ("content", "step", "stops"),
    [
        (None, 9, False),
        ("", 0, True),
        ("  \n", 3, True),
        ("7", 6, False),
        ("7\n", 7, True),
        ("7", 8, True),
        ("?", 1, True),
    ],
)
def test_a_stop_file_means_now_or_after_its_step(tmp_path: Path, content: str | None, step: int, stops: bool) -> None:
    if content is not None:
        (tmp_path / "stop").write_text(content)
    assert stops_after(tmp_path / "stop", step) is stops


def test_what_was_asked_once_stays_asked_until_it_is_obeyed(tmp_path: Path) -> None:
    requests = Requests(tmp_path, 1)
    assert requests.read(1) is Request.none
    (tmp_path / "stop").touch()
    time.sleep(LOOK_S)
    assert [requests.read(2), requests.read(2)] == [Request.stop, Request.stop]
    requests.obeyed()
    assert not (tmp_path / "stop").exists()
    assert Requests(tmp_path, 2).read(2) is Request.none


def test_the_deadline_is_obeyed_earlier_the_longer_saves_take(tmp_path: Path) -> None:
    def stops(seconds_left: float, save_s: float) -> bool:
        requests = Requests(tmp_path, 1, time.time() + seconds_left)
        requests.note_save(save_s)
        return requests.read(1) is Request.stop

    assert not stops(100, 1)
    assert stops(100, 100)
    assert stops(-1, 0.001)


def test_the_launcher_s_orders_reach_a_running_attempt(tmp_path: Path) -> None:
    path = orders_file(tmp_path, 3)
    orders = Orders(path, deadline=time.time() + 1000)
    requests, asked = Requests(tmp_path, 3), Asked(path)
    for request in (Request.none, Request.resize_at_save, Request.resize, Request.none):
        orders.ask(request)
        assert (requests.read(1), asked.request) == (request, request)
    assert asked.deadline is not None


def test_requests_are_ranked_by_urgency_and_a_change_of_processes_waits_for_a_save() -> None:
    order = [Request.none, Request.resize_at_save, Request.resize, Request.stop, Request.interrupt, Request.terminate]
    assert all(a < b for a, b in pairwise(order))
    flag = StopFlag()
    flag.ask(lambda step: Request.resize_at_save)
    assert flag.agree(1, save_due=False).exit_code is None
    assert (flag.agree(2, save_due=True).exit_code, flag.agree(2, save_due=True).save) == (46, True)


def test_every_stop_saves() -> None:
    for request, code in ((Request.stop, 45), (Request.interrupt, 130), (Request.terminate, 143), (Request.resize, 46)):
        flag = StopFlag()
        flag.ask(lambda step, request=request: request)
        agreed = flag.agree(1)
        assert (agreed.exit_code, agreed.save) == (code, True)
