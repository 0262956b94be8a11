"""Programs that try to get out of the sandbox, to wear it down, or to pass tests that they do not solve.

Data: tests run each and look for its effects from outside. `@NAME@` in a source is replaced by what the test sets up:
CANARY (a file outside, with a secret in it), FOLDER (its folder), PORT (a TCP port that is listened to), UNIX (a
listening Unix socket), REPO, HOME, TESTFILE, PACKAGE (paths of the repository), MARK (a process name to look for).
"""

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """A program, and what must come of it.

    Args:
      name: for the test's id.
      source: Python; most print "held" where an attempt was refused and "ESCAPED" where it was not.
      kind: how it must end.
      stdout: what it must have printed, None where that does not matter.
      processes: how many it may have; 1 refuses to fork.
      seconds: its time limit; the default is long, so that a busy machine changes no verdict.
      slow: takes seconds rather than a fraction of one.
    """

    name: str
    source: str
    kind: str = "ok"
    stdout: str | None = "held\n"
    processes: int = 1
    seconds: float = 30.0
    slow: bool = False


@dataclass(frozen=True, kw_only=True)
class Forgery:
    """A program that does not solve the task (`solve(n)` is n squared plus one) and tries to pass its tests."""

    name: str
    source: str


def refused(*attempts: str, setup: str = "") -> str:
    """A program that makes attempts, each an expression, and says whether the system refused them all."""
    lines = ["import os, sys, socket, ctypes, pathlib, signal, subprocess", "libc = ctypes.CDLL(None, use_errno=True)"]
    lines += ["def call(number, *args):"]
    lines += ["    result = libc.syscall(number, *args)"]
    lines += ["    if result == -1: raise OSError(ctypes.get_errno(), 'refused')"]
    lines += ["    return result", setup, "escaped = []"]
    for attempt in attempts:
        lines += ["try:", f"    escaped.append(({attempt!r}, {attempt}))", "except (OSError, ImportError):", "    pass"]
    return "\n".join([*lines, "print('ESCAPED', escaped) if escaped else print('held')"]) + "\n"


def _open(*paths: str) -> str:
    return refused(*[f"open({path!r}, 'rb').read(100)" for path in paths])


# Numbers of system calls on x86_64 and aarch64, chosen inside.
_NUMBERS = "import os\nNR = lambda x86, arm: x86 if os.uname().machine == 'x86_64' else arm"

READING = [
    Hostile(name="password-file", source=_open("/etc/passwd", "/etc/shadow", "/etc/hostname", "/etc/hosts")),
    Hostile(
        name="processes-of-others", source=_open("/proc/1/environ", "/proc/1/cmdline", "/proc/version", "/proc/mounts")
    ),
    Hostile(
        name="itself-through-proc",
        source=_open("/proc/self/environ", "/proc/self/maps", "/proc/self/mem", "/proc/self/cwd/main.py"),
    ),
    Hostile(name="root-through-proc", source=refused("os.listdir('/proc/self/root/')", "os.listdir('/proc/self/fd')")),
    Hostile(name="the-test-file", source=_open("@TESTFILE@", "checks.py", "names.json", "/tmp/checks.py")),
    Hostile(name="the-repository", source=refused("os.listdir('@REPO@')", "os.listdir('@PACKAGE@')")),
    Hostile(name="the-home", source=refused("os.listdir('@HOME@/.ssh')", "open('@HOME@/.bashrc').read()")),
    Hostile(name="a-canary", source=_open("@CANARY@", "/tmp/@CANARY@", "../@CANARY@", "../../../../..@CANARY@")),
    Hostile(name="sysfs-and-block-devices", source=_open("/sys/kernel/notes", "/dev/sda", "/dev/vda", "/dev/kmsg")),
    Hostile(name="physical-memory", source=_open("/dev/mem", "/dev/kmem", "/dev/port", "/proc/kcore")),
    Hostile(
        name="environment",
        source=(
            "import os\nours = {'PYTHONHASHSEED', 'MALLOC_ARENA_MAX', 'LC_CTYPE'}\n"
            "print('held' if set(os.environ) <= ours else dict(os.environ))"
        ),
    ),
    Hostile(
        name="hostname-and-user",
        source=(
            "import os, socket\n"
            "print('held' if (socket.gethostname(), os.getuid(), os.getgid(), os.getgroups()) in"
            " [('sandbox', 65534, 65534, []), ('sandbox', 65534, 65534, [65534])] else 'ESCAPED')"
        ),
    ),
    Hostile(
        name="inherited-descriptors",
        source=(
            "import os\nopen_ones = []\n"
            "for fd in range(1024):\n"
            "    try: os.fstat(fd); open_ones.append(fd)\n"
            "    except OSError: pass\n"
            "for fd in range(3, 1024):\n"
            "    try: os.write(fd, b'ok 0 0.0 0 0\\n'); open_ones.append(fd)\n"
            "    except OSError: pass\n"
            "print('held' if open_ones == [0, 1, 2] else open_ones)"
        ),
    ),
    Hostile(
        name="our-package", source=refused("__import__('deepseek_jax')", "__import__('jax')", "__import__('numpy')")
    ),
    Hostile(
        name="our-package-by-path",
        source=refused("__import__('deepseek_jax')", setup="sys.path[:0] = ['@REPO@', '@PACKAGE@/rewards/sandbox']"),
    ),
    Hostile(
        name="memory-of-the-launcher",
        source=refused("call(NR(310, 270), 1, 0, 0, 0, 0, 0)", "open('/proc/1/mem')", setup=_NUMBERS),
    ),
]

WRITING = [
    Hostile(
        name="absolute-paths",
        source=refused(
            *[f"open({path!r}, 'w')" for path in ("@CANARY@", "@FOLDER@/new", "/new", "/usr/lib/new", "/etc/new")]
        ),
    ),
    Hostile(name="root-of-the-tree", source=refused("os.mkdir('/new')", "os.rmdir('/etc')", "os.rename('/tmp', '/t')")),
    Hostile(name="parent-folders", source=refused("open('../new', 'w')", "open('../../../@CANARY@', 'a')")),
    Hostile(
        name="symbolic-link-outside",
        source=refused(
            "open('link', 'a')",
            "open('folder/new', 'w')",
            setup="os.symlink('@CANARY@', 'link')\nos.symlink('@FOLDER@', 'folder')",
        ),  # fmt: skip
    ),
    Hostile(name="hard-link-outside", source=refused("os.link('@CANARY@', 'x')", "os.link(os.__file__, 'x')")),
    Hostile(name="shared-memory-folder", source=refused("open('/dev/shm/x', 'w')", "open('/run/x', 'w')")),
    Hostile(name="the-interpreter", source=refused("open(os.__file__, 'a')", "open(sys.executable, 'r+b')")),
    Hostile(
        name="temporary-folder",
        source="open('/tmp/@MARK@', 'w').write('x')\nimport tempfile\ntempfile.mkstemp()\nprint('held')",
    ),
    Hostile(
        name="set-user-id",
        source=refused("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", "os.chown('main.py', 0, 0)"),
    ),
    Hostile(name="device-nodes", source=refused("os.mknod('disk', 0o60600, os.makedev(8, 0))", "os.mkfifo('pipe')")),
    Hostile(
        name="mounts",
        source=refused(
            "call(NR(165, 40), b'none', b'/tmp', b'tmpfs', 0, None)",
            "call(NR(165, 40), None, b'/', None, 32 | 4096, None)",
            "call(NR(166, 39), b'/usr/lib', 2)",
            "call(442, -100, b'/', 0, bytes(32), 32)",
            "call(430, b'tmpfs', 0)",
            setup=_NUMBERS,
        ),
    ),
    Hostile(
        name="new-namespaces",
        source=refused(
            "call(NR(272, 97), 0x10000000)",
            "call(NR(272, 97), 0x00020000)",
            "call(NR(308, 268), 0, 0)",
            "call(NR(56, 220), 0x10000000 | 17, 0, 0, 0, 0)",
            "call(435, bytes(88), 88)",
            setup=_NUMBERS,
        ),
        processes=8,
    ),
    Hostile(
        name="second-root",
        source=refused(
            "os.chroot('jail')",
            "call(NR(155, 41), b'.', b'.')",
            "os.stat('../../../../../../../..@CANARY@')",
            "[os.fchdir(root), os.chroot('.'), open('@CANARY@').read()]",
            setup=_NUMBERS + "\nos.mkdir('jail')\nroot = os.open('/', os.O_RDONLY)",
        ),
    ),
]

NETWORK = [
    Hostile(name="tcp", source=refused("socket.create_connection(('127.0.0.1', @PORT@), timeout=1)")),
    Hostile(name="tcp-outside", source=refused("socket.create_connection(('192.0.2.1', 80), timeout=1)")),
    Hostile(
        name="udp", source=refused("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))")
    ),
    Hostile(name="names", source=refused("socket.getaddrinfo('example.org', 80)")),
    Hostile(name="unix-socket", source=refused("socket.socket(socket.AF_UNIX).connect('@UNIX@')")),
    Hostile(name="abstract-unix-socket", source=refused("socket.socket(socket.AF_UNIX).connect('\\0@MARK@')")),
    Hostile(name="listening", source=refused("socket.create_server(('127.0.0.1', 0))")),
    Hostile(
        name="pair-to-others",
        source=refused(
            "socket.socketpair(socket.AF_INET)",
            "pair[0].bind('/tmp/x')",
            "pair[0].bind('\\0@MARK@')",
            "pair[0].connect('@UNIX@')",
            "pair[0].listen()",
            setup="pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        ),
    ),
    Hostile(name="netlink-and-raw", source=refused("socket.socket(16, 3, 0)", "socket.socket(17, 3, 0)")),
    Hostile(name="io-uring", source=refused("call(425, 8, bytes(120))")),
]

PROCESSES = [
    Hostile(
        name="kill-everything",
        source=(
            "import os\n"
            "for target in (-1, 0, 1, 2, os.getppid(), *range(2, 3000)):\n"
            "    try: os.kill(target, 9)\n"
            "    except OSError: pass\n"
            "print('held')"
        ),
        # Process 1 cannot kill itself, and there is no other.
    ),
    Hostile(name="trace-others", source=refused("call(NR(101, 117), 0, 0, 0, 0)", setup=_NUMBERS)),
    Hostile(name="fork-refused", source=refused("os.fork()", "os.posix_spawn(sys.executable, ['x'], {})")),
    Hostile(name="subprocess-refused", source=refused("subprocess.run([sys.executable, '-c', 'pass'])")),
    Hostile(
        name="shell", source=refused("os.stat('/bin/sh')", "os.stat('/usr/bin/env')", "os.execv('/bin/sh', ['x'])")
    ),
    Hostile(
        name="fork-bomb",
        source="import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        kind="timeout",
        stdout=None,
        processes=16,
        seconds=1.0,
    ),
    Hostile(
        name="thread-bomb",
        source=(
            "import threading, time\n"
            "started = 0\nthreading.stack_size(1 << 16)\n"
            "try:\n"
            "    for _ in range(10000):\n"
            "        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()\n"
            "        started += 1\n"
            "except RuntimeError: pass\n"
            "print('held' if started == 64 else started)"
        ),
    ),
    Hostile(
        name="daemon",
        source=(
            "import os, time, ctypes, signal\n"
            "if os.fork() == 0:\n"
            "    os.setsid()\n"
            "    if os.fork(): os._exit(0)\n"
            "    for n in range(1, 32):\n"
            "        if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
            "    ctypes.CDLL(None).prctl(15, b'@MARK@', 0, 0, 0)\n"
            "    os.closerange(0, 100)\n"
            "    time.sleep(1000)\n"
            "time.sleep(0.3)\n"
            "print('held')"
        ),
        processes=8,
    ),
    Hostile(
        name="daemon-that-keeps-the-pipes",
        source=(
            "import os, time, ctypes\n"
            "if os.fork() == 0:\n"
            "    os.setsid()\n"
            "    ctypes.CDLL(None).prctl(15, b'@MARK@', 0, 0, 0)\n"
            "    time.sleep(1000)\n"
            "time.sleep(0.2)\n"
            "os.write(1, b'held\\n')\n"
            "os._exit(0)"
        ),
        processes=8,
    ),
    Hostile(
        name="outliving-its-keeper",
        source=refused("call(NR(157, 167), 1, 0, 0, 0, 0)", setup=_NUMBERS),
    ),
    Hostile(
        name="more-of-everything",
        source=(
            "import resource\nheld = 0\n"
            "kinds = [resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE]\n"
            "for kind in kinds:\n"
            "    try: resource.setrlimit(kind, (2**40, 2**40))\n"
            "    except ValueError: held += 1\n"
            "print('held' if held == 4 else 'ESCAPED')"
        ),
    ),
    Hostile(
        name="kernel-corners",
        source=refused(
            "call(NR(321, 280), 0, 0, 0)",
            "call(NR(298, 241), bytes(128), 0, -1, -1, 0)",
            "call(NR(250, 219), 0, -3, 0)",
            "call(NR(323, 282), 0)",
            "call(NR(246, 104), 0, 0, 0, 0)",
            "call(NR(175, 105), 0, 0, b'')",
            "call(NR(319, 279), b'x', 0)",
            "call(NR(29, 194), 0, 1 << 30, 0o1600)",
            "call(NR(304, 265), -100, bytes(16), 0)",
            "call(600, 0)",
            setup=_NUMBERS,
        ),
    ),
    Hostile(
        name="32-bit-calls",
        source=(
            "import ctypes, mmap, os\n"
            "if os.uname().machine != 'x86_64': os.abort()\n"
            "page = mmap.mmap(-1, 4096, prot=7)\n"
            "page.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid); int 0x80; ret
            "print('ESCAPED', ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())"
        ),
        kind="killed",
        stdout="",
    ),
    Hostile(
        name="capabilities",
        source=(
            "import ctypes, struct\n"
            "data = ctypes.create_string_buffer(24)\n"
            "ctypes.CDLL(None).capget(struct.pack('=Ii', 0x20080522, 0), data)\n"
            "libc = ctypes.CDLL(None)\n"
            "bounding = [c for c in range(41) if libc.prctl(23, c, 0, 0, 0) == 1]\n"
            "print('held' if data.raw == bytes(24) and not bounding and libc.prctl(39, 0, 0, 0, 0) == 1 else 'ESCAPED')"
        ),
    ),
]

_LIBRARY = "import fcntl, mmap, os, time\nlibrary = os.open(os.__file__, os.O_RDONLY)\n" + _NUMBERS

CHANNELS = [
    Hostile(
        name="events-of-files",
        source=refused(
            "call(NR(253, 26), 0)",
            "call(NR(294, 26), 0)",
            "call(NR(300, 262), 0, 0)",
            "fcntl.fcntl(library, fcntl.F_NOTIFY, fcntl.DN_ACCESS)",
            "fcntl.fcntl(library, fcntl.F_SETLEASE, 0)",
            "call(NR(254, 27), 0, b'/usr/lib', 1)",
            setup=_LIBRARY,
        ),  # fmt: skip
    ),
    Hostile(
        name="locks-on-libraries",
        source=refused(
            "fcntl.flock(library, fcntl.LOCK_SH)",
            "fcntl.flock(library, fcntl.LOCK_EX | fcntl.LOCK_NB)",
            "fcntl.lockf(library, fcntl.LOCK_SH | fcntl.LOCK_NB)",
            "fcntl.fcntl(library, fcntl.F_GETLK, bytes(32))",
            "fcntl.fcntl(library, 36, bytes(32))",
            "fcntl.fcntl(library, 37, bytes(32))",
            setup=_LIBRARY,
        ),  # fmt: skip
    ),
    Hostile(
        name="flushing-the-host",
        source=refused(
            "call(NR(162, 81))",
            "call(NR(306, 267), library)",
            "call(NR(277, 84), library, 0, 4096, 7)",
            setup=_LIBRARY,
        ),  # fmt: skip
    ),
    Hostile(
        name="page-cache",
        source=refused(
            "os.posix_fadvise(library, 0, 0, os.POSIX_FADV_DONTNEED)",
            "call(NR(187, 213), library, 0, 4096)",
            "call(NR(27, 232), 0, 4096, bytes(8))",
            "os.preadv(library, [bytearray(8)], 0, os.RWF_NOWAIT)",
            "call(451, library, bytes(16), bytes(40), 0)",
            setup=_LIBRARY,
        ),  # fmt: skip
    ),
    Hostile(
        name="hints-and-pipes",
        source=refused(
            "fcntl.fcntl(library, 1035, bytes(8))",
            "fcntl.fcntl(library, 1036, bytes(8))",
            "fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
            setup=_LIBRARY,
        ),  # fmt: skip
    ),
    Hostile(
        name="the-machine-s-numbers",
        source=refused("call(NR(99, 179), bytes(200))", "call(NR(252, 31), 3, 65534)", setup=_NUMBERS),
    ),
    Hostile(
        name="times-of-libraries",
        source=_LIBRARY + "\nbefore = os.fstat(library).st_atime_ns\nos.read(library, 10)\n"
        "print('held' if os.fstat(library).st_atime_ns == before else 'ESCAPED')",
    ),
    Hostile(
        name="queues-and-keys",
        source=refused(
            "call(NR(240, 180), b'/x', 66, 0o600, 0)",
            "call(NR(68, 186), 7, 0o1600)",
            "call(NR(64, 190), 7, 1, 0o1600)",
            "call(NR(29, 194), 7, 4096, 0o1600)",
            "call(NR(248, 217), b'user', b'x', b'y', 1, -4)",
            setup=_NUMBERS,
        ),  # fmt: skip
    ),
    Hostile(
        name="futex-on-a-library",
        # A shared futex neither sleeps nor wakes: both ends of the channel are gone.
        source=refused(
            "wait()",
            "call(NR(449, 449), 0, 0, 0, 0, 0)",
            setup=_LIBRARY + "\npage = mmap.mmap(library, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)\n"
            "word = ctypes.c_uint32.from_buffer(page)\n"
            "def wait():\n"
            "    start = time.monotonic()\n"
            "    try: call(NR(202, 98), ctypes.byref(word), 0, word.value, (ctypes.c_long * 2)(2, 0))\n"
            "    except OSError:\n"
            "        if time.monotonic() - start < 1.0: raise\n"
            "    return time.monotonic() - start\n"
            "assert call(NR(202, 98), ctypes.byref(word), 1, 1) == 0",
        ),  # fmt: skip
    ),
    Hostile(name="descriptors-of-others", source=refused("os.listdir('/dev/fd/../../1')", "open('/dev/fd/9')")),
]

EXHAUSTION = [
    Hostile(name="sleep", source="import time\ntime.sleep(1000)", kind="timeout", stdout="", seconds=0.3),
    Hostile(name="busy-loop", source="while True: pass", kind="timeout", stdout="", seconds=0.3),
    Hostile(
        name="ignored-signals",
        source=(
            "import signal\n"
            "for n in signal.valid_signals():\n"
            "    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
            "while True: pass"
        ),
        kind="timeout",
        stdout="",
        seconds=0.3,
    ),
    Hostile(name="waits-for-input", source="import os\nos.read(0, 1)\nprint('held')"),
    Hostile(name="stopped-by-itself", source="import os\nos.kill(os.getpid(), 19)\nprint('held')"),
    Hostile(name="memory-bomb", source="x = bytearray(1 << 40)", kind="memory", stdout=""),
    Hostile(
        name="memory-in-steps", source="x = []\nwhile True: x.append(bytearray(1 << 24))", kind="memory", stdout=""
    ),
    Hostile(
        name="disk-bomb",
        source=(
            "import os\n"
            "written = 0\n"
            "try:\n"
            "    for n in range(10000):\n"
            "        with open(f'f{n}', 'wb', buffering=0) as f:\n"
            "            for _ in range(64): written += f.write(bytes(1 << 20))\n"
            "except OSError: pass\n"
            "print('held' if written <= 17 << 20 else written)"
        ),
    ),
    Hostile(
        name="sparse-file",
        source="import os\ntry: os.truncate('main.py', 1 << 40); print('ESCAPED')\nexcept OSError: print('held')",
    ),
    Hostile(
        name="many-files",
        source=(
            "n = 0\ntry:\n    while n < 10000: open(f'f{n}', 'w').close(); n += 1\n"
            "except OSError: pass\nprint('held' if n < 5000 else n)"
        ),
    ),
    Hostile(
        name="many-descriptors",
        source=(
            "import os\nn = 0\ntry:\n    while n < 1000: os.dup(0); n += 1\n"
            "except OSError: pass\nprint('held' if n < 64 else n)"
        ),
    ),
    Hostile(name="huge-output", source="print('x' * (1 << 24))", kind="output", stdout=None),
    Hostile(
        name="huge-error-output",
        source="import sys\nwhile True: sys.stderr.write('y' * 65536)",
        kind="output",
        stdout=None,
    ),
    Hostile(
        name="output-without-newline",
        source="import os\nwhile True: os.write(1, b'z' * 4096)",
        kind="output",
        stdout=None,
    ),
    Hostile(name="closed-pipes", source="import os\nos.closerange(0, 3)\nos._exit(0)", stdout=""),
    Hostile(
        name="closed-pipes-and-asleep",
        source="import os, time\nos.closerange(0, 3)\ntime.sleep(1000)",
        kind="timeout",
        stdout="",
        seconds=0.3,
    ),
    Hostile(name="endless-recursion", source="def f(): return f()\nf()", kind="error", stdout=""),
    Hostile(
        name="recursion-without-bound",
        source="import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    __repr__ = lambda self: repr(self)\nrepr(A())",
        # from 3.12 on the interpreter bounds the recursion of its own C code, too
        kind="killed" if sys.version_info < (3, 12) else "error",
        stdout="",
    ),
    Hostile(name="segmentation-fault", source="import ctypes\nctypes.string_at(0)", kind="killed", stdout=""),
    Hostile(name="abort", source="import os\nos.abort()", kind="killed", stdout=""),
    Hostile(
        name="slow-expression",
        source="import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')",
        kind="timeout",
        stdout="",
        seconds=0.3,
    ),
    Hostile(name="power-tower", source="print(9 ** 9 ** 9)", kind="timeout", stdout="", seconds=0.3),
    Hostile(name="power-tower-evaluated", source="eval('9 ** 9 ** 9')", kind="timeout", stdout="", seconds=0.3),
    Hostile(name="nested-source", source="try: eval('(' * 10**6)\nexcept (SyntaxError, MemoryError): print('held')"),
    Hostile(name="nul-bytes", source="print('ESCAPED')\0", kind="error", stdout=""),
    Hostile(name="lone-surrogate", source="print('\udc80')", kind="error", stdout=""),
    Hostile(name="not-python", source="#include <stdio.h>\nint main() {}", kind="error", stdout=""),
    Hostile(name="large-source", source="#" * (10 << 20) + "\nprint('held')"),
    Hostile(
        name="large-program",
        source="x = [" + "1," * (5 << 20) + "]\nprint('held')",
        kind="memory",
        stdout="",
        slow=True,
    ),
    Hostile(name="invalid-output", source="import os\nos.write(1, b'\\xff\\xfe\\x00held')", stdout=None),
    Hostile(
        name="core-dump",
        source="import os, resource\nprint(resource.getrlimit(resource.RLIMIT_CORE), flush=True)\nos.abort()",
        kind="killed",
        stdout="(1, 1)\n",
    ),
]

ALL = [*READING, *WRITING, *NETWORK, *PROCESSES, *CHANNELS, *EXHAUSTION]

_WRONG = "def solve(n):\n    return 0\n"
_MODULES = "[m for m in list(sys.modules.values()) if m]"

FORGERIES = [
    Forgery(name="wrong", source=_WRONG),
    Forgery(name="nothing-defined", source="x = 1\n"),
    Forgery(name="exit-first", source="import sys\nsys.exit(0)\n"),
    Forgery(name="hard-exit-first", source="import os\nos._exit(0)\n"),
    Forgery(name="exit-when-called", source="import sys\ndef solve(n):\n    sys.exit(0)\n"),
    Forgery(name="hard-exit-when-called", source="import os\ndef solve(n):\n    os._exit(0)\n"),
    Forgery(
        name="verdicts-printed",
        source="import os\nfor fd in range(64):\n"
        "    try: os.write(fd, b'1\\n1\\n1\\n1\\nPASS\\nOK\\n')\n    except OSError: pass\n" + _WRONG,
    ),
    Forgery(
        name="verdicts-at-exit",
        source="import atexit, os\natexit.register(lambda: [os.write(fd, b'1\\n1\\n1\\n') for fd in (1, 2, 3, 4)])\n"
        + _WRONG,
    ),
    Forgery(
        name="answers-in-advance",
        source="import os\nfor fd in (3, 4, 5):\n"
        "    try: os.write(fd, b'{\"value\": true}\\n' * 20)\n    except OSError: pass\n" + _WRONG,
    ),
    Forgery(
        name="answers-of-no-kind",
        source="import os\nfor fd in (3, 4, 5):\n"
        '    try: os.write(fd, b\'{"value": {"ref": 0}}\\n[[[\\n{"raise": "StopIteration", "text": ""}\\n\' * 9)\n'
        "    except OSError: pass\n" + _WRONG,
    ),
    Forgery(
        name="always-equal",
        source="class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = None\ndef solve(n):\n    return Yes()\n",
    ),
    Forgery(
        name="always-equal-number",
        source="class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def solve(n):\n    return Yes(0)\n",
    ),
    Forgery(
        name="always-equal-text",
        source="class Yes(str):\n    def __eq__(self, other): return True\n    def __format__(self, spec): return 'x'\n"
        "    __hash__ = str.__hash__\ndef solve(n):\n    return Yes('5')\n",
    ),
    Forgery(
        name="always-equal-float",
        source="class Yes(float):\n    def __eq__(self, other): return True\n    def hex(self): return '0x1.4p+2'\n"
        "def solve(n):\n    return Yes('nan')\n",
    ),
    Forgery(name="raises-assertion", source="def solve(n):\n    raise AssertionError\n"),
    Forgery(name="raises-stop", source="def solve(n):\n    raise StopIteration\n"),
    Forgery(name="raises-exit-type", source="def solve(n):\n    raise KeyboardInterrupt\n"),
    Forgery(
        name="patched-builtins",
        source="import builtins\nbuiltins.AssertionError = type('Quiet', (BaseException,), {})\n"
        "builtins.compile = builtins.exec = builtins.eval = builtins.isinstance = lambda *a, **k: True\n" + _WRONG,
    ),
    Forgery(
        name="patched-json",
        source='import json\njson.dumps = lambda value: \'{"value": {"int": "5"}}\'\n' + _WRONG,
    ),
    Forgery(
        name="patched-modules",
        source="import sys, types\nfake = types.ModuleType('checks')\nfake.CHECKS = []\nsys.modules['checks'] = fake\n"
        "sys.modules['json'] = fake\n" + _WRONG,
    ),
    Forgery(
        name="tests-file-written",
        source="open('checks.py', 'w').write('CHECKS = [lambda: None] * 3')\nopen('main.py', 'w').write('')\n" + _WRONG,
    ),
    Forgery(name="new-standard-output", source="import sys, io\nsys.stdout = sys.stderr = io.StringIO()\n" + _WRONG),
    Forgery(
        name="frames-searched",
        source="import sys, inspect, re\ndef solve(n):\n    text = ''\n    frame = sys._getframe()\n    while frame:\n"
        "        text += repr(frame.f_locals) + repr(frame.f_globals.get('CHECKS'))\n        frame = frame.f_back\n"
        "    found = re.findall(r'== ?(\\d+)', text)\n    return int(found[0]) if found else 0\n",
    ),
    Forgery(
        name="memory-searched",
        source="import gc, re\ndef solve(n):\n    text = ' '.join(o for o in gc.get_objects() if isinstance(o, str))\n"
        "    for o in gc.get_objects():\n        if isinstance(o, (dict, list, tuple)):\n"
        "            text += ' '.join(x for x in o if isinstance(x, str))\n"
        "    found = re.findall(r'solve\\(%d\\) == (\\d+)' % n, text)\n    return int(found[0]) if found else 0\n",
    ),
    Forgery(
        name="files-searched",
        source="import os, re\ndef solve(n):\n"
        "    for folder, _, names in os.walk('/tmp'):\n        for name in names:\n"
        "            text = open(os.path.join(folder, name), errors='replace').read()\n"
        "            found = re.findall(r'solve\\(%d\\) == (\\d+)' % n, text)\n"
        "            if found: return int(found[0])\n    return 0\n",
    ),
    Forgery(
        name="argument-with-answers",
        source="def solve(n):\n    return getattr(n, 'expected', None) or getattr(n, '_judge', 0)\n",
    ),
    Forgery(
        name="optimised-away",
        source="import sys, os\nif sys.argv[-1] != 'x':\n"
        "    os.execv(sys.executable, [sys.executable, '-O', 'main.py', 'x'])\n" + _WRONG,
    ),
    Forgery(name="hangs-when-called", source="import time\ndef solve(n):\n    time.sleep(1000)\n"),
    Forgery(name="endless-answer", source="def solve(n):\n    return iter(int, 1)\n"),
    Forgery(name="deep-answer", source="def solve(n):\n    x = []\n    for _ in range(10**6): x = [x]\n    return x\n"),
    Forgery(name="great-answer", source="def solve(n):\n    return 1 << (1 << 26)\n"),
    Forgery(name="fork-of-the-player", source="import os\ntry: os.fork()\nexcept OSError: pass\n" + _WRONG),
    Forgery(
        name="every-module-patched",
        source=f"import sys\nfor m in {_MODULES}:\n    for k in list(vars(m)):\n"
        "        if k in ('encode', '_passes', 'loads'): setattr(m, k, lambda *a, **k: True)\n" + _WRONG,
    ),
]
