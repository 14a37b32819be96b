"""The memory of machine code, and what its threads hold and write to."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.meta_gradient.checkpointed import longest_segment
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.meta_gradient.native.job import Job
from maml_pipeline.tasks import TaskBatch
from tests.native_cases import (
    ENGINE,
    IMAGE_NETWORKS,
    case,
    threads,
)
from tests.networks import inner_loop


def peak(name: str, steps: int, order: str = "second") -> int:
    network, batch = case(name, cross_entropy, tasks=1, dtype=torch.float32)
    inner = inner_loop(order, 0.1, steps)
    ENGINE.meta_gradient(network, cross_entropy, batch, inner)  # the first call fills caches
    return peak_bytes(lambda: ENGINE.meta_gradient(network, cross_entropy, batch, inner))


@pytest.mark.parametrize("name", ["strided", "pooled", "mlp"])
def test_memory_obeys_the_laws_of_the_methods(name: str) -> None:
    loss = 4
    first, more = (peak(name, steps, "first") for steps in (1, 10))
    assert more - first == 9 * loss
    two, six, ten = (peak(name, steps) for steps in (2, 6, 10))
    assert ten - six == six - two > 0
    one, three, five = (peak(name, 10, f"truncated-{n}") for n in (1, 3, 5))
    assert five - three == three - one > 0
    assert peak(name, 12, "truncated-3") - three == 2 * loss
    theta = 4 * sum(p.numel() for n, p in case(name, cross_entropy)[0].named_parameters())
    if name in IMAGE_NETWORKS:  # the biases of its four convolutions are not needed
        theta -= 4 * 4 * 4
    one = peak(name, 1, "checkpointed")
    for steps in (2, 3, 4, 10, 11):
        grown = peak(name, steps, "checkpointed") - one
        assert grown == (longest_segment(steps) - 1) * theta + (steps - 1) * loss


def test_memory_grows_by_one_gradient_a_task_and_by_one_task_a_thread() -> None:
    network, batch = case("strided", cross_entropy, tasks=12, dtype=torch.float32)
    inner = InnerLoop(0.1, 1)
    peaks = {}
    for number in (1, 2, 3):
        for tasks in (4, 8, 12):
            part = TaskBatch(*(tensor[:tasks] for tensor in batch))
            with threads(number):
                ENGINE.meta_gradient(network, cross_entropy, part, inner)
                call = partial(ENGINE.meta_gradient, network, cross_entropy, part, inner)
                peaks[number, tasks] = peak_bytes(call)
    for number in (1, 2, 3):
        assert peaks[number, 12] - peaks[number, 8] == peaks[number, 8] - peaks[number, 4]
    assert peaks[3, 4] - peaks[2, 4] == peaks[2, 4] - peaks[1, 4] > 0


def test_memory_is_free_even_if_a_thread_lets_go_of_its_work_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, batch = case("strided", cross_entropy, tasks=12, dtype=torch.float32)
    call = partial(ENGINE.meta_gradient, network, cross_entropy, batch, InnerLoop(0.1, 1))

    def thrice() -> None:
        for _ in range(3):
            call()

    kept: list[object] = []
    submit = ThreadPoolExecutor.submit

    def submit_and_keep(
        self: ThreadPoolExecutor, function: Callable[..., Any], *args: Any
    ) -> Future[Any]:
        kept.append((function, args))
        return submit(self, function, *args)

    with threads(3):
        call()
        expected = peak_bytes(thrice)
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_keep)
        assert peak_bytes(thrice) == expected and kept


def test_a_thread_that_cannot_be_started_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = case("strided", cross_entropy, tasks=12)
    run, submit = Job.run, ThreadPoolExecutor.submit
    finished: list[object] = []
    started: list[Future[Any]] = []

    def submit_once(self: Any, function: Callable[..., Any], *args: Any) -> Future[Any]:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(submit(self, function, *args))
        return started[0]

    def run_slowly(self: Job, *args: Any) -> None:
        time.sleep(0.1)
        run(self, *args)
        finished.append(args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_once)
    monkeypatch.setattr(Job, "run", run_slowly)
    with threads(3), pytest.raises(RuntimeError, match="can't start"):
        ENGINE.meta_gradient(network, cross_entropy, batch, InnerLoop(0.1, 1))
    assert started[0].done() and len(finished) <= 1


def test_an_interrupt_waits_for_the_threads_that_write_to_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, batch = case("strided", cross_entropy, tasks=12)
    run, has_started, finished = Job.run, threading.Event(), []

    def run_slowly(self: Job, *args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            assert has_started.wait(60)
            raise KeyboardInterrupt
        has_started.set()
        time.sleep(0.1)
        run(self, *args)
        finished.append(args)

    monkeypatch.setattr(Job, "run", run_slowly)
    with threads(2), pytest.raises(KeyboardInterrupt):
        ENGINE.meta_gradient(network, cross_entropy, batch, InnerLoop(0.1, 1))
    assert len(finished) == 1, "and no further task begins"
