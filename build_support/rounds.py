"""Run the tests that start, signal or join processes again and again.

    python build_support/rounds.py ROUNDS [PYTEST OPTION ...]

One line a round on standard output, the whole of what a round printed where it failed or hung (then
with the stacks of all its processes), and the counts at the end. The exit status is 1 unless every
round passed.
"""

import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 7200   # of a round
# Of a test and of a child, five times those of pyproject.toml and tests/children.py: rounds run
# beside other work.
LIMITS = ("-o", "timeout=1200", "-o", "faulthandler_timeout=1350")
CHILD_SECONDS = "1000"
sys.path.insert(0, str(ROOT / "tests"))
import children  # noqa: E402

# The slow ones among them, too, which pytest runs where its expression says "slow".
MARKED = ("-m", "processes and (slow or not slow)")


def one_round(options: list[str]) -> tuple[str, str, str]:
    """(passed, failed or hung; pytest's last line; everything that was printed)."""
    # The others take longer to collect than these to run.
    files = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.processes" in path.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [*LIMITS, *MARKED, *options, *files]
    try:
        result = children.run(command, seconds=SECONDS, cwd=ROOT)
    except AssertionError as error:
        return "hung", f"not done after {SECONDS} s", str(error)

    printed = result.stdout + result.stderr
    last = (result.stdout.strip().splitlines() or ["nothing printed"])[-1]
    if result.returncode == 0:
        return "passed", last, printed
    # Of pytest-timeout, faulthandler and tests/children.py.
    hung = re.search(
        r"Timeout \(?>?\d|not done after", printed
    )
    return ("hung" if hung else "failed"), last, printed


def main(rounds: int, options: list[str]) -> int:
    os.environ |= {"OMP_NUM_THREADS": "1", "FASTSCORE_CHILD_SECONDS": CHILD_SECONDS}
    outcomes = []
    for number in range(1, rounds + 1):
        begin = time.monotonic()
        outcome, last, printed = one_round(options)
        outcomes.append(outcome)
        if outcome != "passed":
            print(printed)
        print(
            f"round {number}: {outcome} after {time.monotonic() - begin:.0f} s: {last}", flush=True
        )

    counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "hung")]
    print(f"{rounds} rounds: {', '.join(counts)}")
    return int(set(outcomes) != {"passed"})


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
