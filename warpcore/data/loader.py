"""The loader: micro-batches of a plan go to worker processes, batches come back in the plan's order, on the device."""

import atexit
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple, Self

import cv2
import torch
from torch.utils.data import DataLoader

from warpcore.data import shared_memory
from warpcore.data.reader import Batch, Reader
from warpcore.data.samples import MicroBatch
from warpcore.data.shared_memory import SHARED_MEMORY, full_message, is_full
from warpcore.errors import UserError
from warpcore.redaction import redact_output
from warpcore.signals import STOP_SIGNALS

PREFETCH_BYTES = 2**32
"""A micro-batch of clips may have a gigabyte."""
# A worker that is told to stop finishes its micro-batch first; one that hangs in a read is killed after this time.
_STOP_SECONDS = 2.0
# Python's resource tracker ignores the other STOP_SIGNALS by itself.
_NOT_FOR_TRACKER = (signal.SIGUSR1, signal.SIGHUP)


class DataWorkerError(RuntimeError):
    """A worker process of the loader was killed or ended by itself."""


class Loader:
    """Iterates the batches of a plan's micro-batches, read ahead by worker processes, with tensors on the device.

    The order is that of `micro_batches`, for any number of workers. `iter(loader)` begins a pass over `micro_batches`
    and returns at once, while workers start and read ahead; they live on for further passes until `close`. A thread
    draws from the plan and copies to the device, so that neither holds up the consumer. Exceptions of the reader and
    of the plan are raised as they are; a worker that dies raises DataWorkerError.

    num_workers: 0 reads in this process, when a batch is asked for. prefetch: micro-batches read ahead per worker;
    fewer, but one, where all of them, of `batch_bytes` each, would take more than PREFETCH_BYTES of shared memory.
    """

    def __init__(
        self,
        micro_batches: Iterable[MicroBatch],
        reader: Reader,
        *,
        num_workers: int,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        batch_bytes: int = 0,
    ):
        if num_workers < 0 or prefetch < 1:
            raise UserError(f"num_workers is at least 0 and prefetch at least 1, not {num_workers} and {prefetch}")
        self.device = torch.device(device)
        self._micro_batches, self._reader = micro_batches, reader
        self._waited_seconds = 0.0
        if batch_bytes and num_workers:
            prefetch = max(1, min(prefetch, PREFETCH_BYTES // (batch_bytes * num_workers)))
        self._workers = _Workers(reader, num_workers, prefetch) if num_workers else None
        self._pass: _Pass | None = None

    @property
    def data_wait_seconds(self) -> float:
        """How long the consumer waited for batches since this was last read."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def __iter__(self) -> Iterator[Batch]:
        if self._workers is None:
            batches = (self._reader.__getitems__(one).to(self.device) for one in self._micro_batches)
        else:
            self._stop_pass()
            self._pass = _Pass(self._workers, self._micro_batches, self.device)
            batches = iter(self._pass)
        return self._timed(batches)

    def close(self) -> None:
        """Stop reading and end the workers; no process is left."""
        self._stop_pass()
        if self._workers:
            self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _stop_pass(self) -> None:
        if self._pass:
            self._pass.stop()
            self._pass = None


class _Pass:
    """One pass over the micro-batches: a thread that keeps the next batch ready on the device."""

    def __init__(self, workers: "_Workers", micro_batches: Iterable[MicroBatch], device: torch.device):
        self._workers, self._micro_batches, self._device = workers, micro_batches, device
        self._ready: queue.Queue[_Ready | _End] = queue.Queue(maxsize=1)
        self._stopping, self._workers_started = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="data loader", daemon=True)
        with _main_script_hidden(unless=workers.need_main_script):
            self._thread.start()
            self._workers_started.wait()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._ready.get()
            if isinstance(item, _Ready):
                yield item.take()
            elif item.error:
                raise item.error
            else:
                return

    def stop(self) -> None:
        """End the thread; workers that do not come back from a read are killed."""
        self._stopping.set()
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            self._workers.kill()
            self._thread.join()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_TRACKER)
        resource_tracker.ensure_running()  # its start would undo the next line
        # The main process decides what a signal means, and needs its workers to finish an update. They inherit what
        # this thread blocks, so that signals can't end them while they still import.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        try:
            for batch in self._workers.batches(self._until_stopped()):
                if not self._hand_over(_Ready.sent(batch, self._device, stream)):
                    return
            self._hand_over(_End(None))
        except BaseException as error:  # whatever it is: the consumer must see it
            self._hand_over(_End(error))
        finally:
            self._workers_started.set()

    def _until_stopped(self) -> Iterator[MicroBatch]:
        self._workers_started.set()  # a DataLoader asks for its first micro-batch when its workers have been started
        for micro_batch in self._micro_batches:
            if self._stopping.is_set():
                return
            yield micro_batch

    def _hand_over(self, item: "_Ready | _End") -> bool:
        """Wait until the consumer takes what lies before it; False when it wants no more."""
        while not self._stopping.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return True
        return False


class _Ready(NamedTuple):
    """A batch whose copy to the device is under way."""

    batch: Batch
    arrived: torch.cuda.Event | None = None

    @classmethod
    def sent(cls, batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> Self:
        """From page-locked memory and on a stream of its own, a copy to a GPU runs beside the computation."""
        if stream is None:
            return cls(batch.to(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            return cls(batch.pin_memory().to(device), stream.record_event())

    def take(self) -> Batch:
        """The batch, for use on the current stream of the calling thread."""
        if self.arrived is not None:
            for tensor in self.batch.tensors():
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(self.arrived)
                tensor.record_stream(stream)  # or its memory could be given away while this stream still reads it
        return self.batch


class _End(NamedTuple):
    error: BaseException | None


class _Workers:
    """The worker processes, over several passes."""

    def __init__(self, reader: Reader, num_workers: int, prefetch: int):
        self.need_main_script = b"__main__" in _pickled(reader)
        self._sampler, self._context = _Sampler(), _Context()
        self._returns = shared_memory.new_returns(num_workers)
        self._loader = _WorkerLoader(
            _Work(reader),
            batch_sampler=self._sampler,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_start_worker, self._returns),
            multiprocessing_context=self._context,
            persistent_workers=True,
            generator=torch.Generator(),  # it seeds its workers, which must not take from the global generator
        )
        _EVERY.add(self)

    def batches(self, micro_batches: Iterator[MicroBatch]) -> Iterator[Batch]:
        """In the order of the micro-batches. Raises what reading or drawing them raised, or DataWorkerError."""
        self._sampler.micro_batches = micro_batches
        try:
            for item in self._loader:
                if isinstance(item, _Failure):
                    raise item.error
                if item.loan is not None:
                    shared_memory.return_when_free(item.batch.images, item.loan, self._returns)
                yield item.batch
        except Exception as error:
            dead = [process for process in self._context.started() if process.exitcode is not None]
            if dead:
                raise DataWorkerError(_obituary(dead[0].pid, dead[0].exitcode)) from error
            if is_full(error):
                raise UserError(full_message()) from error
            raise
        if self._sampler.error is not None:
            raise self._sampler.error

    def close(self) -> None:
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
        self.kill()

    def kill(self) -> None:
        _kill(self._context.started())


class _Context(SpawnContext):
    """Knows the processes that were started with it, of which a DataLoader tells nothing until it has started all."""

    def __init__(self):
        self._made: list[SpawnProcess] = []

    def Process(self, *arguments: Any, **keywords: Any) -> SpawnProcess:
        self._made.append(SpawnProcess(*arguments, **keywords))
        return self._made[-1]

    def started(self) -> list[SpawnProcess]:
        return [process for process in self._made if process.pid is not None]


class _WorkerLoader(DataLoader):
    """A DataLoader that does not warn where there are more workers than CPUs: workers also wait for the storage."""

    def check_worker_number_rationality(self) -> None:
        pass


class _Sampler:
    """The batch sampler of the DataLoader: the micro-batches of the current pass.

    Where drawing one fails, the pass ends with those before it, and `error` says why. An exception would end the
    DataLoader while its workers still start; they would end with tracebacks.
    """

    micro_batches: Iterator[MicroBatch] = iter(())
    error: Exception | None = None

    def __iter__(self) -> Iterator[MicroBatch]:
        self.error = None
        try:
            yield from self.micro_batches
        except Exception as error:
            self.error = error


class _Work:
    """The data set of the DataLoader. Its exceptions are handed over: the DataLoader would bury them in text."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitems__(self, micro_batch: MicroBatch) -> "_Made | _Failure":
        try:
            return _Made(self.reader.__getitems__(micro_batch), shared_memory.lender.take_loan())
        except Exception as error:
            return _Failure(_portable(error))


class _Made(NamedTuple):
    batch: Batch
    loan: shared_memory.Loan | None
    """Of the memory of its images."""


class _Failure(NamedTuple):
    error: Exception


def _portable(error: Exception) -> Exception:
    """The exception with a note of where it arose, as its traceback stays behind; in words if it cannot be pickled."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"raised in a data worker, by {frame.name} in {frame.filename}:{frame.lineno}")
    return error


def _as_it_is(item: "_Made | _Failure") -> "_Made | _Failure":
    return item


def _start_worker(returns: torch.Tensor, worker: int) -> None:
    shared_memory.lender = shared_memory.Lender(worker, returns[worker])
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    redact_output()
    cv2.setNumThreads(0)


def _pickled(reader: Reader) -> bytes:
    try:
        return pickle.dumps(reader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"the reader can't be sent to worker processes: {error}; define its parts at the top of a module, "
            "not as a lambda or inside a function"
        ) from error


def _obituary(pid: int, exitcode: int) -> str:
    if exitcode >= 0:
        return f"data worker {pid} ended by itself with exit code {exitcode}; what it wrote to the terminal says why"
    name = signal.Signals(-exitcode).name
    return (
        f"data worker {pid} was killed by {name}; the usual reason is too little memory "
        f"(SIGBUS: too little of it in {SHARED_MEMORY}): lower num_workers, prefetch or the micro-batch size"
    )


@contextmanager
def _main_script_hidden(unless: bool) -> Iterator[None]:
    """Keep spawned processes from importing the main script again, and all that it imports: they need only the reader.

    It would cost seconds and a gigabyte per worker, and a script without the `__main__` guard would start itself.
    """
    main = sys.modules["__main__"]
    hidden = (
        {} if unless else {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    )
    if hidden:
        main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _kill(processes: Iterable) -> None:
    processes = list(processes)
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


# At exit, multiprocessing sends SIGTERM to workers that are left and waits for them. They ignore it: kill them before.
_EVERY: weakref.WeakSet[_Workers] = weakref.WeakSet()
atexit.register(lambda: [workers.kill() for workers in _EVERY])
