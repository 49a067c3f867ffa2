"""Worker processes: order, errors, death and the end of them."""

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from tests.warpcore.data.test_reader import SIZE, TXT, good, write_shard
from warpcore.data.loader import DataWorkerError, Loader
from warpcore.data.reader import Reader
from warpcore.data.samples import MicroBatch
from warpcore.data.storage import read_ranges
from warpcore.errors import UserError
from warpcore.signals import STOP_SIGNALS

pytestmark = pytest.mark.integration


@pytest.fixture
def micro_batches(tmp_path):
    samples = write_shard(tmp_path / "x.tar", [good(n) for n in range(12)])
    return [MicroBatch(n, SIZE, (samples[n % 12], samples[(5 * n + 1) % 12]), 0, {}, 0) for n in range(20)]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert multiprocessing.active_children() == []
    assert [thread.name for thread in threading.enumerate() if thread.name == "data loader"] == []


def same(one, other) -> bool:
    return (one.number, one.captions, one.seeds) == (other.number, other.captions, other.seeds) and torch.equal(
        one.images, other.images
    )


def read_slowly(url, ranges, version):
    time.sleep(0.02 * (ranges[0][0] % 3))  # workers overtake one another
    return read_ranges(url, ranges, version)


def test_two_workers_give_the_batches_of_none_pass_after_pass(micro_batches):
    expected = list(Loader(micro_batches, Reader(captions=TXT), num_workers=0))
    assert [batch.number for batch in expected] == list(range(20))
    global_generator = torch.get_rng_state()
    with Loader(micro_batches, Reader(captions=TXT, read_ranges=read_slowly), num_workers=2) as loader:
        abandoned = iter(loader)
        assert same(next(abandoned), expected[0])
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == 20
            assert all(map(same, batches, expected))
        assert len(multiprocessing.active_children()) == 2, "the workers were started anew"
        assert loader.data_wait_seconds > 0
        assert loader.data_wait_seconds == 0
    assert torch.equal(torch.get_rng_state(), global_generator)


class Strange(Exception):
    """As exceptions of libraries are: it does not survive pickling."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def fail(url, ranges, version):
    raise PermissionError(13, "not yours", url)


def fail_strangely(url, ranges, version):
    raise Strange("this", "that")


@pytest.mark.parametrize(
    ("read", "kind", "message"),
    [
        (fail, PermissionError, r"not yours: .*x\.tar"),
        pytest.param(fail_strangely, RuntimeError, "Strange: this and that", marks=pytest.mark.slow),
    ],
)
def test_an_exception_in_a_worker_is_raised_as_it_is(micro_batches, read, kind, message):
    with (
        Loader(micro_batches, Reader(captions=TXT, read_ranges=read), num_workers=1) as loader,
        pytest.raises(kind, match=message) as raised,
    ):
        list(loader)
    assert "Traceback" not in str(raised.value)
    assert raised.value.__notes__[0].startswith(f"raised in a data worker, by {read.__name__} in ")


def failing_plan(micro_batches):
    yield from micro_batches[:3]
    raise UserError("the plan has a problem")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_exception_of_the_plan_is_raised_as_it_is(micro_batches, num_workers):
    with (
        Loader(failing_plan(micro_batches), Reader(captions=TXT), num_workers=num_workers) as loader,
        pytest.raises(UserError, match="the plan has a problem"),
    ):
        list(loader)


PLAN_FAILS = """
from warpcore.data.loader import Loader
from warpcore.data.reader import Reader
from warpcore.errors import UserError, run_script


def plan():
    raise UserError("the plan has a problem")
    yield


def main():
    with Loader(plan(), Reader(captions=None), num_workers=2) as loader:
        list(loader)


run_script(main)
"""


def test_workers_that_still_start_end_without_a_traceback(tmp_path):
    (tmp_path / "script.py").write_text(PLAN_FAILS)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "error: the plan has a problem\n")


def die(url, ranges, version):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_and_no_hang(micro_batches):
    began = time.monotonic()
    with (
        Loader(micro_batches, Reader(captions=TXT, read_ranges=die), num_workers=2) as loader,
        pytest.raises(DataWorkerError, match=r"killed by SIGKILL; the usual reason is too little memory"),
    ):
        list(loader)
    assert time.monotonic() - began < 120


def hang(url, ranges, version):
    time.sleep(1000)


def full_for_a_batch(url, ranges, version):
    """As PyTorch says it in a worker."""
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)")


def full_for_a_semaphore(url, ranges, version):
    """As the semaphores of `multiprocessing` say it."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.integration
@pytest.mark.parametrize("read", [full_for_a_batch, pytest.param(full_for_a_semaphore, marks=pytest.mark.slow)])
def test_full_shared_memory_is_named_and_does_not_read_as_a_full_disk(micro_batches, read):
    told = r"shared memory /dev/shm, .* is full .* no disk is.*--shm-size=8g"
    loader = Loader(micro_batches, Reader(captions=TXT, read_ranges=read), num_workers=1)
    with loader, pytest.raises(UserError, match=told):
        next(iter(loader))


def test_closing_does_not_wait_for_a_worker_that_hangs(micro_batches):
    loader = Loader(micro_batches, Reader(captions=TXT, read_ranges=hang), num_workers=1)
    iter(loader)
    time.sleep(0.1)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_workers_outlive_the_signals_that_ask_the_run_to_finish(micro_batches):
    with Loader(micro_batches, Reader(captions=TXT), num_workers=1) as loader:
        batches = iter(loader)
        next(batches)
        for worker in multiprocessing.active_children():
            for number in STOP_SIGNALS:
                os.kill(worker.pid, number)
        assert len(list(batches)) == 19


@pytest.mark.slow
def test_workers_outlive_those_signals_while_they_start(micro_batches):
    with Loader(micro_batches, Reader(captions=TXT), num_workers=2) as loader:
        batches = iter(loader)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
        assert len(list(batches)) == 20
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), "they still reach the main process"


def test_a_reader_that_cannot_travel_is_an_error_before_any_process_starts(micro_batches):
    with pytest.raises(UserError, match="can't be sent to worker processes"):
        Loader(micro_batches, Reader(read_ranges=lambda url, ranges, version: []), num_workers=1)


@pytest.mark.slow
def test_a_script_needs_no_main_guard_and_ends_though_nobody_closed_the_loader(micro_batches, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import pickle, sys
        print("imported", flush=True)
        from warpcore.data.loader import Loader
        from warpcore.data.reader import Reader
        micro_batches = pickle.load(open(sys.argv[1], "rb"))
        for batch in Loader(micro_batches, Reader(), num_workers=1):
            print(batch.number, flush=True)
            if batch.number == 2:
                break
        """)
    )
    (tmp_path / "plan").write_bytes(pickle.dumps(micro_batches))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "plan")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["imported", "0", "1", "2"]
    assert done.stderr == ""


FAILING = """
import pickle, sys, time
from warpcore.data.loader import Loader
from warpcore.data.reader import Reader
from warpcore.errors import UserError, run_script

def main():
    plan, seconds, closed = sys.argv[1:]
    loader = Loader(pickle.load(open(plan, "rb")), Reader(), num_workers=3)
    try:
        iter(loader)
        time.sleep(float(seconds))
        raise UserError("now")
    finally:
        if closed == "closed":
            loader.close()

run_script(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["closed", "left"])
@pytest.mark.parametrize("seconds", ["0", "0.5", "2"])
def test_an_error_while_workers_start_is_one_message(micro_batches, tmp_path, seconds, closed):
    (tmp_path / "script.py").write_text(FAILING)
    (tmp_path / "plan").write_bytes(pickle.dumps(micro_batches))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "plan"), seconds, closed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: now\n")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_whole_on_the_gpu(micro_batches):
    expected = list(Loader(micro_batches, Reader(captions=TXT), num_workers=0))
    with Loader(micro_batches, Reader(captions=TXT), num_workers=2, device="cuda") as loader:
        for batch, on_cpu in zip(loader, expected, strict=True):
            assert batch.images.is_cuda
            assert torch.equal(batch.images.cpu(), on_cpu.images)
