"""Laws of the sandbox: hostile programs get nowhere, honest ones run, and every end is told by its right name."""

import functools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepseek_jax.rewards import sandbox
from deepseek_jax.rewards.sandbox import CompletedProgram, Limits, Program, SandboxUnavailable, run_linked, run_program
from deepseek_jax.rewards.sandbox.seccomp import filter_program
from tests.rewards.hostile import ALL, Hostile

REPO = Path(__file__).resolve().parents[2]
SECRET = "a secret outside"


NAMESPACES = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
flags = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
if libc.unshare(flags) or libc.mount(b"x", b"/tmp", b"tmpfs", 0, None):
    sys.exit("this machine gives no namespaces: " + os.strerror(ctypes.get_errno()))
"""


@functools.cache
def no_namespaces() -> str:
    """Why there can be no sandbox here, asked of the kernel and not of the code under test; "" where there can."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    return subprocess.run([sys.executable, "-c", NAMESPACES], capture_output=True, text=True).stderr.strip()


def run(source: str | bytes, *, allow_unsandboxed: bool = False, **settings: object) -> CompletedProgram:
    return run_program(Program(source=source, **settings), allow_unsandboxed=allow_unsandboxed)


def run_all(programs: list[Program]) -> list[CompletedProgram]:
    with ThreadPoolExecutor(len(programs)) as pool:
        return list(pool.map(run_program, programs))


def need_sandbox() -> None:
    if no_namespaces():
        pytest.skip(no_namespaces())
    assert sandbox.available() is None


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What hostile programs aim at, and whether they have hit it."""

    folder: Path
    tcp: socket.socket
    unix: socket.socket
    mark: str

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    def fill(self, source: str) -> str:
        values = {
            "CANARY": self.canary,
            "FOLDER": self.folder,
            "PORT": self.tcp.getsockname()[1],
            "UNIX": self.folder / "socket",
            "REPO": REPO,
            "HOME": Path.home(),
            "TESTFILE": Path(__file__),
            "PACKAGE": REPO / "deepseek_jax",
            "MARK": self.mark,
        }
        for name, value in values.items():
            source = source.replace(f"@{name}@", str(value))
        return source

    def damage(self) -> list[str]:
        """What has changed out here."""
        found = [] if self.canary.read_text() == SECRET else ["the canary was written to"]
        found += [f"{path} appeared" for path in self.folder.iterdir() if path.name not in ("canary", "socket")]
        found += [
            f"{path} appeared" for path in (Path("/tmp", self.mark), Path("/new"), Path("/etc/new")) if path.exists()
        ]
        found += [f"a connection to {listener}" for listener in (self.tcp, self.unix) if connected(listener)]
        found += [f"process {pid} lives on" for pid in marked_processes(self.mark)]
        return found


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    folder = tmp_path_factory.mktemp("outside")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
        unix.listen()
        tcp.setblocking(False)
        unix.setblocking(False)
        place = Outside(folder=folder, tcp=tcp, unix=unix, mark="h" + secrets.token_hex(6))
        place.canary.write_text(SECRET)
        yield place


def connected(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def marked_processes(mark: str) -> list[int]:
    """Processes of the whole machine that carry the name; one that ends while we look is not there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name = (entry / "comm").read_text().strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if name == mark:
                found.append(int(entry.name))
    return found


HOSTILE = [pytest.param(program, id=program.name, marks=[pytest.mark.slow] if program.slow else []) for program in ALL]


@pytest.mark.parametrize("program", HOSTILE)
def test_hostile_programs_get_nowhere(program: Hostile, outside: Outside):
    need_sandbox()
    limits = Limits(seconds=program.seconds, processes=program.processes, memory_bytes=256 << 20)
    start = time.monotonic()
    ran = run(outside.fill(program.source), limits=limits)
    assert (ran.kind, outside.damage()) == (program.kind, []), (ran.code, ran.stdout[:500], ran.stderr[-500:])
    if program.stdout is not None:
        assert ran.stdout.decode() == program.stdout
    assert ran.seconds < program.seconds + 1.0
    assert time.monotonic() - start < program.seconds + 30.0
    assert len(ran.stdout) + len(ran.stderr) <= 2 * limits.output_bytes


def test_there_are_as_many_hostile_programs_as_the_project_asks_for():
    assert len({program.name for program in ALL}) == len(ALL) >= 40


def test_every_target_is_there_outside_the_sandbox(outside: Outside):
    """The control: without a sandbox the attempts succeed, so that refusals above say something."""
    source = """
        import os, socket
        print(open('@CANARY@').read())
        os.listdir('@REPO@'), open('@TESTFILE@').read(), open('/etc/passwd').read(), open('/proc/1/comm').read()
        open('@FOLDER@/new', 'w').close()
        with socket.create_connection(('127.0.0.1', @PORT@), timeout=5): pass
        with socket.socket(socket.AF_UNIX) as s: s.connect('@UNIX@')
    """
    command = [sys.executable, "-c", outside.fill(textwrap.dedent(source))]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, SECRET + "\n"), ran.stderr
    damage = outside.damage()
    (outside.folder / "new").unlink()
    assert len(damage) == 3, damage


def test_a_process_that_would_live_on_is_seen(outside: Outside):
    """The control of the process table: while a marked program runs, the marks are found."""
    need_sandbox()
    source = outside.fill("import ctypes, time\nctypes.CDLL(None).prctl(15, b'@MARK@', 0, 0, 0)\ntime.sleep(30)")
    thread = threading.Thread(target=run, args=(source,), kwargs={"limits": Limits(seconds=1.0)})
    thread.start()
    seen: list[int] = []
    while thread.is_alive() and not seen:
        seen = marked_processes(outside.mark)
    thread.join()
    assert seen and not marked_processes(outside.mark)


def test_honest_programs_run():
    need_sandbox()
    source = """
        import asyncio.queues, bisect, collections, decimal, fractions, heapq, itertools, math, random, sys, threading
        import tempfile
        threading.stack_size(64 << 20)
        result = []
        thread = threading.Thread(target=lambda: result.append(sum(map(int, sys.stdin))))
        thread.start(); thread.join()
        with tempfile.TemporaryFile('w+') as file:
            file.write('né'); file.seek(0)
            print(result[0], open('data').read(), file.read())
        exit()
    """
    ran = run(textwrap.dedent(source), stdin="1\n2\n39\n", files={"data": b"given"}, limits=Limits(seconds=30.0))
    assert (ran.kind, ran.code, ran.stdout.decode(), ran.stderr) == ("ok", 0, "42 given né\n", b"")


@pytest.mark.parametrize("count", [15, 64])
def test_threads_start_at_the_default_memory_every_time(count: int):
    need_sandbox()
    source = f"""
        import threading
        for _ in range(3):
            barrier = threading.Barrier({count} + 1)
            def work():
                data = [bytearray(1000) for _ in range(200)]
                barrier.wait()
            threads = [threading.Thread(target=work) for _ in range({count})]
            for thread in threads: thread.start()
            barrier.wait()
            for thread in threads: thread.join()
        print(len(threads))
    """
    programs = [Program(source=textwrap.dedent(source), limits=Limits(seconds=30.0))] * 4
    for ran in run_all(programs):
        assert (ran.kind, ran.stdout) == ("ok", b"%d\n" % count), ran.stderr[-300:]


LOCKING = """
    import fcntl, os, sys, time
    library = os.open(os.__file__, os.O_RDONLY)
    held = []
    for lock in (fcntl.flock, fcntl.lockf):
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            try: lock(library, kind | fcntl.LOCK_NB)
            except OSError as error: held.append(error.errno)
            else: held.append(0)
    print(held, flush=True)
    time.sleep(HOLD)
"""


def test_what_one_program_locks_another_does_not_see():
    need_sandbox()
    source = textwrap.dedent(LOCKING)
    limits = Limits(seconds=30.0)
    alone = run(source.replace("HOLD", "0"), limits=limits).stdout
    pair = [Program(source=source.replace("HOLD", hold), limits=limits) for hold in ("1.5", "0.1")]
    assert [ran.stdout for ran in run_all(pair)] == [alone, alone]


def test_files_are_flushed_where_there_is_nothing_to_flush():
    need_sandbox()
    source = """
        import os
        with open("x", "w") as file:
            file.write("1")
            file.flush()
            os.fsync(file.fileno())
        print(open("x").read())
    """
    assert run(textwrap.dedent(source), limits=Limits(seconds=30.0)).stdout == b"1\n"


def test_standard_streams_have_their_names():
    need_sandbox()
    source = """
        import os
        print(open("/dev/stdin").readline(), file=open("/dev/stderr", "w"))
        with open("/dev/stdout", "w") as out: out.write("written\\n")
        print(sorted(set(os.listdir("/dev"))), os.path.exists("/proc"))
    """
    ran = run(textwrap.dedent(source), stdin="a\n" * 3, limits=Limits(seconds=30.0))
    devices = ["fd", "null", "random", "stderr", "stdin", "stdout", "urandom", "zero"]
    assert (ran.stderr, ran.stdout.decode()) == (b"a\n\n", f"written\n{devices} False\n")


def test_installed_packages_are_there_for_whom_they_are_given_and_no_others():
    need_sandbox()
    source = "import numpy\nprint(numpy.arange(3).sum())\ntry: import jax\nexcept ImportError: print('none')"
    limits = Limits(seconds=30.0)
    given = Program(source=source, limits=limits, packages=("numpy", "not_installed"))
    first, second = run_all([given, Program(source=source, limits=limits)])
    assert first.stdout == b"3\nnone\n", first.stderr
    assert second.kind == "error" and b"No module named 'numpy'" in second.stderr


def test_a_program_that_the_kernel_kills_for_memory_is_an_error_and_no_verdict(outside: Outside):
    need_sandbox()
    source = outside.fill("import ctypes, time\nctypes.CDLL(None).prctl(15, b'@MARK@', 0, 0, 0)\ntime.sleep(60)")

    def kill() -> None:
        wait_until(lambda: marked_processes(outside.mark))
        os.kill(marked_processes(outside.mark)[0], 9)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SandboxUnavailable, match="memory"):
        run(source, limits=Limits(seconds=60.0))
    thread.join()


def test_processor_time_ends_a_program_of_many_threads_as_time_does():
    need_sandbox()
    source = """
        import threading
        def work():
            while True: pass
        for _ in range(8): threading.Thread(target=work).start()
    """
    ran = run(textwrap.dedent(source), limits=Limits(seconds=1.0))
    assert ran.kind == "timeout" and ran.seconds < 2.0


def test_a_missing_interpreter_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_interpreter", lambda: "/does/not/exist/python")
    reason = sandbox.available.__wrapped__()
    assert reason is not None and "/does/not/exist/python" in reason and "\n" not in reason
    with pytest.raises(SandboxUnavailable, match="/does/not/exist/python"):
        sandbox._launch([Program(source="")], sandboxed=False)


def test_the_same_program_prints_the_same_on_every_run():
    need_sandbox()
    source = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}), hash('x'))"
    first, second = run_all([Program(source=source)] * 2)
    assert first.stdout == second.stdout and first.kind == "ok"


def test_input_larger_than_a_pipe_arrives_whole_and_input_not_read_harms_nothing():
    need_sandbox()
    text = "0123456789" * 100_000
    assert run("import sys\nprint(len(sys.stdin.read()))", stdin=text).stdout == b"1000000\n"
    assert run("print('done')", stdin=text).stdout == b"done\n"


def test_an_error_is_told_with_its_status_and_words():
    need_sandbox()
    ran = run("print('before', flush=True)\nraise KeyError('why')")
    assert (ran.kind, ran.code, ran.stdout) == ("error", 1, b"before\n") and b"KeyError: 'why'" in ran.stderr
    assert run("import sys\nsys.exit(7)").code == 7


def test_output_at_the_limit_is_kept_and_beyond_it_is_cut():
    need_sandbox()
    limits = Limits(output_bytes=1000, seconds=30.0)
    whole = run("print('x' * 999)", limits=limits)
    assert (whole.kind, len(whole.stdout)) == ("ok", 1000)
    cut = run("print('x' * 1000)", limits=limits)
    assert (cut.kind, cut.stdout) == ("output", b"x" * 1000)


def test_linked_programs_talk_and_the_second_ends_with_the_first():
    need_sandbox()
    first = "import sys\nprint('ping', flush=True)\nsys.stderr.write(input())"
    second = "import time\nprint(input() + ' pong', flush=True)\ntime.sleep(1000)"
    limits = Limits(seconds=30.0)
    start = time.monotonic()
    ran = run_linked(Program(source=first, limits=limits), Program(source=second, limits=limits))
    assert (ran.kind, ran.stderr, ran.stdout) == ("ok", b"ping pong", b"")
    assert time.monotonic() - start < 25.0


def test_the_launcher_loads_nothing_but_the_standard_library():
    source = "import sys; sys.path.append(sys.argv[1]); import launcher; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", source, str(Path(sandbox.__file__).parent)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) <= {"launcher", "__main__"}
    assert not {"json", "re", "signal", "typing"} & set(loaded)


def test_programs_die_with_the_process_that_started_them(outside: Outside):
    need_sandbox()
    hostile = outside.fill("import ctypes, time\nctypes.CDLL(None).prctl(15, b'@MARK@', 0, 0, 0)\ntime.sleep(1000)")
    source = (
        "from deepseek_jax.rewards.sandbox import Limits, Program, run_program\n"
        f"run_program(Program(source={hostile!r}, limits=Limits(seconds=100.0)))"
    )
    trainer = subprocess.Popen([sys.executable, "-c", source], cwd=REPO)
    wait_until(lambda: marked_processes(outside.mark))
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not marked_processes(outside.mark))


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux's unshare to become an ordinary user")
@pytest.mark.parametrize("user", [1000, 0])
def test_an_ordinary_user_has_the_sandbox_too(user: int):
    """And so has root in a namespace that knows no other user, such as a rootless container."""
    need_sandbox()
    source = """
        import os
        assert os.geteuid() == USER
        from deepseek_jax.rewards.sandbox import Program, available, run_program
        assert available() is None, available()
        program = "import os\\nprint(os.getuid(), os.path.exists('/etc/passwd'))"
        print(run_program(Program(source=program)).stdout.decode())
    """
    as_user = ["unshare", "--user", f"--map-user={user}", f"--map-group={user}"]
    command = [*as_user, sys.executable, "-c", textwrap.dedent(source).replace("USER", str(user))]
    ran = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert ran.stdout.split() == ["65534", "False"], ran.stderr


def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: "no namespaces here")


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch):
    no_sandbox(monkeypatch)
    monkeypatch.setattr(sandbox, "_launch", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(SandboxUnavailable, match="no namespaces here.*allow_unsandboxed=True"):
        run("print(1)")
    with pytest.raises(SandboxUnavailable, match="no namespaces here"):
        run_linked(Program(source=""), Program(source=""))


def test_other_systems_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    reason = sandbox.available.__wrapped__()
    assert reason is not None and "darwin" in reason and "Linux" in reason and "\n" not in reason


def test_a_sandbox_that_cannot_be_built_is_an_error_and_not_a_verdict(monkeypatch: pytest.MonkeyPatch):
    """A broken step on the way in stops the run: the program never starts less protected."""
    need_sandbox()
    visible = {**sandbox._visible(), "binds": [*sandbox._visible()["binds"], ("/does/not/exist", "folder")]}
    monkeypatch.setattr(sandbox, "_visible", lambda: visible)
    with pytest.raises(SandboxUnavailable, match="/does/not/exist") as failure:
        run("print(1)")
    assert "\n" not in str(failure.value)
    with pytest.raises(SandboxUnavailable, match="/does/not/exist"):
        run_linked(Program(source=""), Program(source=""))


def test_a_filter_that_the_kernel_refuses_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    need_sandbox()
    monkeypatch.setattr(sandbox, "_filter", lambda fork: b"\xff" * 8)
    with pytest.raises(SandboxUnavailable, match="seccomp"):
        run("print(1)")


@pytest.mark.skipif(sys.platform != "linux", reason="the unsandboxed mode is tested on Linux only")
def test_when_told_so_it_runs_unsandboxed_within_limits(monkeypatch: pytest.MonkeyPatch, outside: Outside):
    no_sandbox(monkeypatch)
    here = lambda source, seconds=30.0: run(
        outside.fill(source),
        limits=Limits(seconds=seconds, memory_bytes=256 << 20, processes=8),
        allow_unsandboxed=True,
    )
    assert here("import os\nprint(os.listdir('.'))").stdout == b"['main.py']\n"
    assert here("while True: pass", 0.5).kind == "timeout"
    assert here("bytearray(1 << 40)").kind == "memory"
    assert here("while True: print('x' * 4096)").kind == "output"
    daemon = next(program for program in ALL if program.name == "daemon")
    assert here(daemon.source.replace("os.closerange(0, 100)", "")).stdout == b"held\n"
    assert marked_processes(outside.mark) == []


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_denies_what_it_says(machine: str):
    """Both tables, run by an interpreter of classic BPF."""
    socket_call, clone, prctl, read, arch = {
        "x86_64": (41, 56, 157, 0, 0xC000003E),
        "aarch64": (198, 220, 167, 63, 0xC00000B7),
    }[machine]
    pair, fcntl, futex, fsync = {"x86_64": (53, 72, 202, 74), "aarch64": (199, 25, 98, 82)}[machine]
    allow, deny, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    alone, forking = filter_program(machine, fork=False), filter_program(machine, fork=True)
    for code in (alone, forking):
        assert verdict(code, read, arch) == allow
        assert verdict(code, socket_call, arch, 2, 1) == deny
        assert verdict(code, clone, arch, 0x10000000 | 17) == deny
        assert verdict(code, clone, arch, 0x003D0F00) == allow
        assert verdict(code, 435, arch) == absent
        assert verdict(code, 452, arch) == absent
        assert verdict(code, 0x40000000 | read, arch) == absent
        assert verdict(code, read, 0x40000003) == kill
        assert verdict(code, prctl, arch, 1, 0) == deny
        assert verdict(code, prctl, arch, 15, 0) == allow
        assert verdict(code, pair, arch, 1, 1) == allow
        assert verdict(code, pair, arch, 2, 1) == deny
        assert [verdict(code, fcntl, arch, 3, command) for command in (0, 3, 4, 1030)] == [allow] * 4
        assert [verdict(code, fcntl, arch, 3, command) for command in (5, 6, 7, 37, 1024, 1026, 1031)] == [deny] * 7
        assert [verdict(code, futex, arch, 0, op) for op in (128, 129, 137, 393)] == [allow] * 4
        assert [verdict(code, futex, arch, 0, op) for op in (0, 9, 265)] == [0x0005000B] * 3
        assert [verdict(code, futex, arch, 0, op) for op in (1, 3, 5, 10)] == [0x00050000] * 4
        assert verdict(code, fsync, arch, 3) == 0x00050000
    assert verdict(alone, clone, arch, 17) == deny
    assert verdict(forking, clone, arch, 17) == allow
    assert filter_program("riscv64", fork=False) is None


def verdict(code: bytes | None, number: int, arch: int, *args: int) -> int:
    """What the filter returns for a system call."""
    assert code is not None
    data = number.to_bytes(4, "little") + arch.to_bytes(4, "little") + bytes(8)
    data += b"".join(arg.to_bytes(8, "little") for arg in [*args, *[0] * (6 - len(args))])
    at, value = 0, 0
    while True:
        instruction = code[8 * at : 8 * at + 8]
        op, k = int.from_bytes(instruction[:2], sys.byteorder), int.from_bytes(instruction[4:], sys.byteorder)
        at += 1
        if op == 0x06:
            return k
        if op == 0x20:
            value = int.from_bytes(data[k : k + 4], "little")
        else:
            taken = {0x15: value == k, 0x25: value > k, 0x45: bool(value & k)}[op]
            at += instruction[2] if taken else instruction[3]


def test_the_filter_names_the_calls_of_this_machine():
    """The table against the C library's header, where there is one."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if os.uname().machine != "x86_64" or not header.exists():
        pytest.skip("no header of system call numbers for x86_64 here")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
    numbers = {name.removeprefix("__NR_"): int(number) for _, name, number in lines}
    from deepseek_jax.rewards.sandbox.seccomp import _DENIED, _EMPTY

    named = {**_DENIED, **_EMPTY}
    assert {name: pair[0] for name, pair in named.items()} == {name: numbers.get(name) for name in named}


@pytest.mark.parametrize(
    "values",
    [{"seconds": 0.0}, {"seconds": float("inf")}, {"processes": 0}, {"memory_bytes": 1 << 20}, {"file_bytes": 1.5}],
)
def test_limits_are_checked(values: dict):
    with pytest.raises(ValueError, match=f"Limits: {next(iter(values))}: got"):
        Limits(**values)


@pytest.mark.parametrize("name", ["", "..", "a/b", "main.py", "/etc/passwd", "a\0"])
def test_file_names_are_plain(name: str):
    with pytest.raises(ValueError, match="Program: files"):
        Program(source="", files={name: "x"})
