"""Tasks for the tests of the worker pool; a module of its own, since workers import it."""

import os
import signal
import sys
import time


def act(task):
    """Does what the task says; worker processes only."""
    name, argument = task
    return ACTIONS[name](argument)


def math_verify_alone(pair):
    """math-verify as its documentation uses it, of [completion, right answer in dollars]."""
    from math_verify import parse, verify

    completion, gold = pair
    return verify(parse(gold, parsing_timeout=None), parse(completion, parsing_timeout=None), timeout_seconds=None)


def algebra_only(pair):
    """math-verify without the exact path before it."""
    from deepseek_jax.rewards.algebra import algebra_equal

    return algebra_equal(*pair)


def spin(_):
    while True:
        pass


def compute(_):
    # One bytecode that holds the interpreter: no Python signal handler or thread would get a turn.
    return len(str(10**10_000_000 % 7 ** (10**8)))


def eat(_):
    return len([b"x" * 2**20 for _ in range(2**14)])


def fail(message):
    raise OSError(message)


def chatter(argument):
    print('["done", "forged"]', flush=True)
    print("noise", file=sys.stderr, flush=True)
    return argument


def nap(seconds):
    time.sleep(seconds)
    return os.getpid()


ACTIONS = {
    "echo": lambda argument: argument,
    "spin": spin,
    "compute": compute,
    "eat": eat,
    "fail": fail,
    "recurse": lambda argument: ACTIONS["recurse"](argument),
    "die": lambda code: os._exit(code),
    "segfault": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "nap": nap,
    "chatter": chatter,
    "modules": lambda names: [name for name in names if name in sys.modules],
    "threads": lambda _: len(os.listdir("/proc/self/task")),
}
