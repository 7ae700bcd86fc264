"""Replays one case, or runs many.

python -m tests.fuzz 4711                   prints case 4711 of the torch backend as Python, and runs it
python -m tests.fuzz 4711 --shrink          makes it smaller first, if it fails
python -m tests.fuzz --examples 200000 --jobs 16 --out found.json
python -m tests.fuzz --examples 10000 --backend interpret --jobs 16
python -m tests.fuzz --examples 3000 --backend gpu --jobs 14
"""

import argparse
import json
import os
import sys
import tempfile


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("seed", nargs="?", type=int, help="the case to replay")
    parser.add_argument("--backend", choices=("torch", "interpret", "gpu"), default="torch")
    parser.add_argument("--shrink", action="store_true", help="make a failing case smaller")
    parser.add_argument("--examples", type=int, default=1000, help="how many cases to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--finite", default="", help="dead places that hold numbers: lengths,mask,queries,captures")
    parser.add_argument("--out", help="file for counts and failures, JSON")
    chosen = parser.parse_args()
    if chosen.backend == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    # Names that repeat from run to run would fill the user's own store with kernels that nobody needs again.
    with tempfile.TemporaryDirectory(prefix="flexdecode-fuzz-") as folder:
        os.environ.setdefault("FLEXDECODE_CACHE_DIR", folder)
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(folder, "triton"))
        return _run_one(chosen) if chosen.seed is not None else _run_many(chosen)


def _run_one(chosen) -> int:
    from .check import check
    from .generate import DRAWS, random_case
    from .runner import run_cases
    from .shrink import shrink

    case = random_case(chosen.seed, chosen.backend)
    case = shrink(case) if chosen.shrink else case
    print(case.source(), flush=True)
    check(case)
    print("passes")
    first = chosen.seed - chosen.seed % DRAWS[chosen.backend]
    failed = [r for r in run_cases(chosen.backend, range(first, chosen.seed + 1)) if r["kind"]]
    if failed and failed[-1]["seed"] == chosen.seed:
        print(f"fails after seeds {first} to {chosen.seed - 1}: {failed[-1]['error']}")
        return 1
    return 0


def _run_many(chosen) -> int:
    from .runner import checked_places, run_parallel

    finite = checked_places(chosen.finite)
    found = run_parallel(chosen.backend, chosen.start, chosen.examples, chosen.jobs, chosen.minutes, finite)
    if chosen.out:
        with open(chosen.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    print(f"{found['examples']} cases in {found['seconds']} s, {found['failed']} failed")
    for kind, number in found["kinds"].items():
        seeds = [f["seed"] for f in found["failures"] if f["kind"] == kind][:5]
        print(f"{number:7d}  {kind}  {seeds}")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
