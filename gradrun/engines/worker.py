"""The process of a worker: answers the requests on its stdin."""

from __future__ import annotations

import os
import sys

from gradrun.engines.child_process import (
    end_with_parent,
    read_frame,
    take_stdout,
    write_frame,
)


def main() -> None:
    """Pin this process to the CPUs in the arguments, then answer requests until stdin ends."""
    end_with_parent()
    replies = take_stdout()
    from gradrun.engines.messages import Open, Task, decode_request, encode
    from gradrun.engines.range_runner import serve

    all_cpus: set[int] = set()
    if cpus := [int(cpu) for cpu in sys.argv[2:]]:
        # After the import of torch: OpenMP lets idle threads spin only if there are CPUs for all
        # when it is loaded, and the measurement for `workers: auto` uses more threads.
        all_cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)

    def receive() -> Open | Task | None:
        data = read_frame(sys.stdin.buffer)
        return decode_request(data) if data else None

    serve(receive, lambda reply: write_frame(replies, encode(reply)), all_cpus)
    os._exit(0)  # skip torch's slow clean-up


if __name__ == "__main__":
    main()
