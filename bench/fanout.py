"""What it costs to push: one scan to thousands of subscribers, beside other servers in the same run.

    python -m bench.fanout [--work NAME …] [--quick] [--rounds 3] [--plot FILE.svg]

The cost is the CPU time of the server process (user and system, from /proc) for each delivery, which other work on
the machine changes little; a ratio is taken within a round, and rounds of the servers alternate. The server has one
core, the load (bench/load.c) and the producer the other. Latency is taken from a timestamp that the producer puts in
each event. A delivery that is missing, comes twice or out of order makes the run fail.

Peers (bench/peers/): a bare write() loop in C, which is the floor; Nchan (Debian: nginx, libnginx-mod-nchan); ws and
Socket.IO on Node (fetched with npm); python-socketio and sse-starlette (pip install .[dev]). What is not installed is
left out by name.
"""

import argparse
import os
import tempfile
from pathlib import Path

from bench import connections, deliveries
from bench.plot import draw_costs
from bench.rounds import Bench
from bench.subscribers import SOURCE, compile_c

WORKS = {
    "fan-out": deliveries.fan_out,
    "fast": deliveries.fan_out_fast,
    "wide": deliveries.fan_out_wide,
    "many-scans": deliveries.many_scans,
    "memory": connections.idle_memory,
    "hold": connections.hold,
    "connects": connections.connects,
    "finished": deliveries.finished_scan,
    "beside-scans": deliveries.beside_scans,
    "stalled": deliveries.stalled_client,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join(f"{name}: {(work.__doc__ or '').splitlines()[0].rstrip('.')}" for name, work in WORKS.items())
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), help=f"only these. {names}")
    parser.add_argument("--quick", action="store_true", help="short runs and one round: to see that all works")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="draw the CPU time a delivery as an SVG")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            folder=Path(folder),
            load=compile_c(SOURCE, Path(folder)),
            server_cpus={cores[0]},
            load_cpus={cores[-1]},
            rounds=1 if options.quick else options.rounds,
            is_quick=options.quick,
        )
        for name in options.work:
            # The producer runs in this process; a work that pins nothing sets this back for itself.
            os.sched_setaffinity(0, bench.load_cpus or cores)
            with bench.attempt(name):
                WORKS[name](bench)
            print(f"\nRepeat with: python -m bench.fanout --work {name}{' --quick' * options.quick}", flush=True)
    if options.plot:
        options.plot.write_text(draw_costs(bench.costs))
    if bench.faults:
        raise SystemExit("FAILED\n" + "\n".join(bench.faults))


if __name__ == "__main__":
    main()
