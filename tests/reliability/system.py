"""What Linux tells of this process."""

import os
import resource
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def thread_total():
    return len(os.listdir("/proc/self/task"))


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def virtual_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


def available_bytes():
    words = Path("/proc/meminfo").read_text().split()
    return int(words[words.index("MemAvailable:") + 1]) * 1024


def children(pid):
    """Processes that pid has started, directly."""
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                for child in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


class AddressSpace:
    """`with AddressSpace(more):` lets the process have so many bytes more than now, and no more."""

    def __init__(self, more):
        self.limit = virtual_bytes() + more

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (self.limit, self.before[1]))

    def __exit__(self, *details):
        resource.setrlimit(resource.RLIMIT_AS, self.before)
