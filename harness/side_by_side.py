"""Timing things against each other: each in a process of its own, in blocks of calls that take turns.

Networks that share a process share its caches, memory and threads, and none of them is then as fast as it is alone. Blocks in
turn let a disturbance of the machine hit all alike.
"""

import multiprocessing
import time

import torch


def blocks_in_turn(makers, blocks, calls, threads):
    """Time a block of calls of each thing in turn -> {name: [seconds of a call, one figure for each block]}.

    makers: {name: (function, arguments)}; function(*arguments), called in a new process, returns the function that is timed,
    warmed up. Both must be importable by name. calls: of a block. threads: of PyTorch in each process. Raises RuntimeError
    where a process fails; its traceback is printed by then.
    """
    context = multiprocessing.get_context('spawn')
    workers = {}
    seconds = {name: [] for name in makers}
    try:
        for name, (function, arguments) in makers.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, threads, function, arguments), daemon=True)
            process.start()
            there.close()
            workers[name] = process, here
            _receive(name, here)  # made and warm
        for _ in range(blocks):
            for name, (_, pipe) in workers.items():
                pipe.send(calls)
                seconds[name].append(_receive(name, pipe) / calls)
    finally:
        for process, pipe in workers.values():
            pipe.close()  # which ends the process
            process.join(10)
    return seconds


def _receive(name, pipe):
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f'the process that times {name} has failed') from None


def _serve(pipe, threads, function, arguments):
    """In the new process: make the thing, then time as many calls as are asked for, until nobody asks."""
    torch.set_num_threads(threads)
    call = function(*arguments)
    pipe.send(None)
    while True:
        try:
            calls = pipe.recv()
        except EOFError:
            return
        began = time.perf_counter()
        for _ in range(calls):
            call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - began)
