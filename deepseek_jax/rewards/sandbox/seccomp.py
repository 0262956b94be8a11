"""The system call filter of sandboxed programs, as a classic BPF program."""

import struct

_ARCHES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_LAST_KNOWN = 450
"""The highest system call number that the table below was written against; later ones do not exist here."""

# Name: (number on x86_64, number on aarch64), None where it does not exist.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # no network, not even among themselves (a connected pair, as event loops want, is the exception below)
    "socket": (41, 198), "bind": (49, 200), "connect": (42, 203), "listen": (50, 201),
    # what is seen or held in files that others have open too: events, locks, flushing, the page cache
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27), "flock": (73, 32),
    "sync": (162, 81), "syncfs": (306, 267), "sync_file_range": (277, 84), "mincore": (27, 232),
    "fadvise64": (221, 223), "readahead": (187, 213), "preadv2": (327, 286), "pwritev2": (328, 287),
    # what the whole machine has in common
    "sysinfo": (99, 179), "ioprio_set": (251, 30), "ioprio_get": (252, 31),
    # no memory that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "io_setup": (206, 0), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    # namespaces, mounts, roots
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "mknod": (133, None), "mknodat": (259, 33), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # the kernel's rarely walked corners
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "personality": (135, 92),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "uselib": (134, None),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "syslog": (103, 116), "lookup_dcookie": (212, 18),
    # the machine
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "vhangup": (153, 58),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162),
}  # fmt: skip
# Done in the sandbox's own memory anyway: they answer that they are done.
_EMPTY = {"fsync": (74, 82), "fdatasync": (75, 83), "msync": (26, 227)}
_FORK, _VFORK = (57, None), (58, None)
_SOCKETPAIR, _FCNTL, _FUTEX, _FUTEX_WAITV = (53, 199), (72, 25), (202, 98), (449, 449)
_AF_UNIX = 1
# Of fcntl: locks of all kinds, leases and notices on files, hints that stay with an inode, the size of pipes, of
# which all programs of a user have a share.
_FCNTL_DENIED = (5, 6, 7, 36, 37, 38, 1024, 1025, 1026, 1031, 1035, 1036, 1037, 1038)
_FUTEX_PRIVATE, _FUTEX_WAITS = 128, (0, 9, 256, 265)
_CLONE, _CLONE3, _PRCTL, _IOCTL = (56, 220), (435, 435), (157, 167), (16, 29)
_CLONE_NEW, _CLONE_THREAD = 0x7E020000, 0x00010000
_PR_SET_PDEATHSIG, _TIOCSTI, _TIOCLINUX = 1, 0x5412, 0x541C

_LOAD, _EQUAL, _GREATER, _BITS, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24
_ALLOW, _KILL, _NO_PERMISSION, _NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_DONE, _AGAIN = 0x00050000, 0x0005000B


def filter_program(machine: str, *, fork: bool) -> bytes | None:
    """The BPF program that denies what a graded program has no business with.

    Denied with EPERM: sockets but for connected pairs, uncounted shared memory, other processes' memory, namespaces,
    mounts, device nodes, modules, keys, BPF, performance events, clocks, `prctl(PR_SET_PDEATHSIG)` (by which programs
    die with their supervisor), keystroke injection, and what makes the files that all programs see, libraries, a
    channel between them: events, locks, leases, hints, the state of the page cache. Flushing is said to be done, and
    is not: all that a program writes is memory. A futex that another process could share wakes nobody and never
    sleeps. `clone3` and calls newer than Linux 6.4 answer ENOSYS, since a filter cannot see into the former's
    arguments and does not know the latter. A call of another architecture (32-bit, x32) kills the program or answers
    ENOSYS.

    Args:
      machine: as `os.uname().machine` names it.
      fork: whether new processes are allowed; threads always are.

    Returns:
      An array of the kernel's `struct sock_filter`, 8 bytes each; None for a machine without a table.

    Source: Linux, include/uapi/linux/seccomp.h, filter.h and the system call tables.
    """
    if machine not in _ARCHES:
        return None
    arch, column = _ARCHES[machine]
    code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NUMBER), (_GREATER, 0, 1, _LAST_KNOWN), (_RETURN, 0, 0, _NO_SUCH_CALL)]
    for numbers in (_CLONE3, _FUTEX_WAITV):
        code += _on(numbers[column], [(_RETURN, 0, 0, _NO_SUCH_CALL)])
    for numbers in _EMPTY.values():
        code += _on(numbers[column], [(_RETURN, 0, 0, _DONE)])
    forking = [] if fork else [_FORK, _VFORK]
    for numbers in [*_DENIED.values(), *forking]:
        if numbers[column] is not None:
            code += _on(numbers[column], [(_RETURN, 0, 0, _NO_PERMISSION)])
    deny, allow = (_RETURN, 0, 0, _NO_PERMISSION), (_RETURN, 0, 0, _ALLOW)
    clone = [(_LOAD, 0, 0, _ARG0), (_BITS, 0, 1, _CLONE_NEW), deny]
    clone += [allow] if fork else [(_BITS, 0, 1, _CLONE_THREAD), allow, deny]
    code += _on(_CLONE[column], clone)
    code += _on(_PRCTL[column], [(_LOAD, 0, 0, _ARG0), (_EQUAL, 0, 1, _PR_SET_PDEATHSIG), deny, allow])
    keys = [(_EQUAL, 0, 1, _TIOCSTI), deny, (_EQUAL, 0, 1, _TIOCLINUX), deny]
    code += _on(_IOCTL[column], [(_LOAD, 0, 0, _ARG1), *keys, allow])
    code += _on(_SOCKETPAIR[column], [(_LOAD, 0, 0, _ARG0), (_EQUAL, 0, 1, _AF_UNIX), allow, deny])
    refused = [step for command in _FCNTL_DENIED for step in ((_EQUAL, 0, 1, command), deny)]
    code += _on(_FCNTL[column], [(_LOAD, 0, 0, _ARG1), *refused, allow])
    code += _on(_FUTEX[column], _futex())
    code.append(allow)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _futex() -> list[tuple[int, int, int, int]]:
    """Threads meet at private futexes; pthread_join alone waits at a shared one, and tries again when told to."""
    waits = [step for command in _FUTEX_WAITS for step in ((_EQUAL, 0, 1, command), (_RETURN, 0, 0, _AGAIN))]
    private = [(_LOAD, 0, 0, _ARG1), (_BITS, 0, 1, _FUTEX_PRIVATE), (_RETURN, 0, 0, _ALLOW)]
    return [*private, *waits, (_RETURN, 0, 0, _DONE)]


def _on(number: int, body: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """`body` for one system call; the others jump over it."""
    return [(_EQUAL, 0, len(body), number), *body]
