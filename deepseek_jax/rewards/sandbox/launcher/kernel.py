"""System calls that the standard library lacks, through libc. Each raises OSError, which says what was being done."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
SIGKILL, SIGXCPU = 9, 24
_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_MNT_DETACH, _AT_RECURSIVE = 2, 0x8000
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4
_LAST_CAPABILITY = 63
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def unshare() -> None:
    """Enters new namespaces of all kinds."""
    _check(_libc.unshare(_NEW_NAMESPACES), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    what = f"mount of {kind or source or 'private'} on {target}"
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), what)


def restrict(path: str, attributes: int, *, below: bool = False) -> None:
    """mount_setattr: unlike a remount it reaches every mount below, and keeps the flags that it does not name."""
    change = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags, size = _AT_RECURSIVE if below else 0, ctypes.c_size_t(len(change))
    result = _libc.syscall(_SYS_MOUNT_SETATTR, -100, os.fsencode(path), flags, change, size)
    _check(result, f"mount_setattr of {path} (Linux 5.12 or newer)")


def pivot_root() -> None:
    """Makes the working folder the root, and leaves the old one behind."""
    _check(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")


def sethostname(name: bytes) -> None:
    _check(_libc.sethostname(name, len(name)), "sethostname")


def drop_capabilities() -> None:
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl(PR_CAP_AMBIENT)")
    for capability in range(_LAST_CAPABILITY + 1):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def die_with_parent() -> None:
    if sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """Makes this process the parent of what its descendants leave behind."""
    if sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def gain_nothing() -> None:
    """No program that this process executes may have more rights than it."""
    if sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def filter_calls(code: bytes) -> None:
    """Installs a BPF program, an array of `struct sock_filter`, as the filter of system calls."""
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(_Filter(len(code) // 8, code)), 0, 0), "seccomp")


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
