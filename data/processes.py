"""Processes: workers on one machine's cores, ranks of torchrun on several GPUs, what they say, and how they end."""

import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import wraps
from itertools import repeat
from threading import Thread, current_thread, main_thread

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.files import InputError, one_line


@contextmanager
def interruptible() -> Iterator[None]:
    """Meanwhile, a signal to end is a KeyboardInterrupt, and the second one ends the process at once.

    Forks, as those of `datasets`, leave Ctrl-C to their parent, which ends them.
    """
    here, received = os.getpid(), []

    def interrupt(number: int, _) -> None:
        if os.getpid() == here:
            received.append(number)
            if len(received) > 1:
                os._exit(130)
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            sys.exit(130)  # which gives back what it holds: others may wait for it

    signals = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()  # others may not say
    before = {each_signal: signal.signal(each_signal, interrupt) for each_signal in signals}
    try:
        yield
    finally:
        for each_signal, handler in before.items():
            signal.signal(each_signal, handler)


def join_group() -> None:
    """If torchrun has started the process, be one of its ranks. Raises InputError where they cannot meet."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        try:
            dist.init_process_group()
        except (ValueError, RuntimeError) as error:
            message = f"WORLD_SIZE is set, but the processes do not meet ({one_line(error)}): let torchrun start them"
            raise InputError(message) from error


def command(main: Callable[[list[str]], bool]) -> Callable[..., int]:
    """Of a function that says whether all is well, a command: its status is 0 if so, 1 if not, 2 for an error.

    Errors that may happen to anybody are said in one line, others are raised. Interrupted, its status is 130.
    """

    @wraps(main)
    def status(arguments: list[str] | None = None) -> int:
        arguments = sys.argv[1:] if arguments is None else arguments
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # on a terminal that has no ✓
        with interruptible():
            try:
                join_group()
                return 0 if main(arguments) else 1
            except KeyboardInterrupt:
                hint = "" if arguments[:1] == ["bench"] else "; the same command goes on from what is finished"
                print(f"\nreproduce.py: interrupted{hint}", file=sys.stderr)
                return 130
            except Exception as error:
                if (sentence := explained(error)) is None:
                    raise
                print("reproduce.py: error: " + " ".join(sentence.split()), file=sys.stderr)
                if world() > 1:
                    os._exit(2)  # the other processes wait for this one: torchrun ends them
                return 2
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()

    return status


OUT_OF_MEMORY = """out of memory; what is finished is kept. Adaptation takes most: --adapt-precision bfloat16
halves its activations, --methods leaves methods out, --device cpu has more room"""


def explained(error: Exception) -> str | None:
    """One sentence about an error that lies in the input or the machine; None for any other."""
    if isinstance(error, (InputError, OSError, FloatingPointError)):
        return str(error)
    if isinstance(error, torch.linalg.LinAlgError):
        return f"a decomposition failed ({one_line(error)}); --methods leaves out what is of low rank"
    if isinstance(error, BrokenProcessPool):
        return "a worker was killed, perhaps for want of memory; the same command goes on, --workers 1 takes less"
    on_cpu = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if on_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"{OUT_OF_MEMORY} ({one_line(error)})"
    return None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def choose_device(name: str | None) -> str:
    """The device to run on; in a distributed run, each process has a GPU of its own. Raises InputError."""
    if name is None and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}" if world() > 1 else "cuda"
    name = "cpu" if name is None else name
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # of torch, or of a module that a device needs
        raise InputError(f"--device {name}: not usable here ({one_line(error)}); 'cpu' always is") from None
    return "cpu" if torch.device(name).type == "cpu" else name  # cpu:0 is the same


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def total(value: Tensor) -> Tensor:
    """The sum of what the ranks have."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, (B / ranks, C) -> (B, C), with gradients, which DistributedDataParallel averages."""
    return torch.cat(dist.nn.functional.all_gather(rows)) if world() > 1 else rows


def say(text: str) -> None:
    if rank() == 0:
        tqdm.write(text)


class Worker:
    """In a worker: what all its calls share, and the line of its progress bars."""

    shared: object = None
    line = 0


def progress(items: Iterable | None, description: str, **options) -> tqdm:
    options = {"leave": Worker.shared is None, **options}  # the bars of workers share lines
    return tqdm(items, description, position=Worker.line, disable=rank() > 0, **options)


def each(shared: object, function: Callable, calls: Iterable[tuple], workers: int) -> list:
    """The result of function(shared, *call) for each of the calls, on so many processes with one thread each.

    Small models waste most of a second thread. With one worker, the calls are made here, one by one.
    """
    calls = list(calls)
    if workers == 1 or len(calls) < 2:
        return [function(shared, *call) for call in calls]
    # Forked workers share the memory of all that is there already; one thread each keeps them clear of OpenMP's, which
    # do not survive a fork.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    start = shared, context.RLock(), context.Value("i", 0)
    with ProcessPoolExecutor(min(workers, len(calls)), context, _start_worker, start) as pool:
        try:
            return list(pool.map(_call_in_worker, repeat(function), calls))
        except BaseException:  # an interruption, too, ends the workers at once
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start_worker(shared: object, lock, count) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # not alone
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    with count.get_lock():
        Worker.shared, Worker.line = shared, count.value
        count.value += 1


def _call_in_worker(function: Callable, call: tuple):
    return function(Worker.shared, *call)
