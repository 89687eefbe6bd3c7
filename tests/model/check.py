"""Check the model of rounds with spin: python check.py [--full].

Prints a line for each case. Ends with 1 if a property is violated, or a planted bug is not found;
with 77 (skipped) where there is no spin or no C compiler. --full also takes the cases that need
minutes and several gigabytes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("rounds.pml")
SKIPPED = 77
SECONDS_MAX = 600
DEPTH_MAX = 100_000
RESULT = re.compile(r"errors: (\d+)")
STATES = re.compile(r"(\d+) states, stored")
HOLDS, STUCK, STALE = "holds", "stuck", "stale"
# Of the model checker, in the order in which they are looked for.
FINDINGS = {
    "invalid end state": STUCK,  # somebody waits for ever: a lost message, or no deadline
    "assertion violated": STALE,  # what was read is not of the round
    "out of memory": "unfinished",
    "max search depth too small": "unfinished",
}


@dataclass(frozen=True)
class Case:
    """A model, and what is to be found in it."""

    ranks: int
    in_flight: int
    rounds: int
    crashes: int = 0
    timeouts: int = 0
    some_tokens: bool = False
    bug: str = ""
    finding: str = HOLDS
    full: bool = False

    def macros(self) -> list[str]:
        """Return what the model is made with."""
        macros = {
            "R": self.ranks,
            "F": self.in_flight,
            "N": self.rounds,
            "CRASHES": self.crashes,
            "TIMEOUTS": self.timeouts,
        }
        flags = [f"-D{name}={value}" for name, value in macros.items()]
        return (
            flags
            + ["-DSOME_TOKENS"] * self.some_tokens
            + ([f"-DBUG_{self.bug}"] if self.bug else [])
        )

    def __str__(self) -> str:
        tokens = "some tokens" if self.some_tokens else "all tokens"
        return (
            f"R={self.ranks} F={self.in_flight} N={self.rounds} crashes={self.crashes} "
            f"timeouts={self.timeouts} {tokens} {self.bug}"
        )


CASES = [
    Case(2, 1, 5, crashes=1, timeouts=2),
    Case(2, 2, 6, crashes=1, timeouts=1),
    Case(2, 1, 4, some_tokens=True),
    Case(2, 1, 3, crashes=1, timeouts=1, some_tokens=True),
    Case(2, 2, 5, some_tokens=True, full=True),
    Case(2, 1, 4, crashes=1, timeouts=1, some_tokens=True, full=True),
    Case(3, 1, 4),
    Case(3, 1, 3, timeouts=1),
    Case(3, 1, 3, crashes=1, timeouts=1, full=True),
    Case(3, 1, 4, crashes=1, timeouts=1, full=True),
    Case(2, 1, 4, bug="FEW_SLOTS", finding=STUCK),
    Case(2, 2, 6, bug="FEW_SLOTS", finding=STUCK),
    Case(2, 1, 4, bug="WIDE_WINDOW", finding=STUCK),
    Case(2, 2, 6, bug="WIDE_WINDOW", finding=STUCK),
    Case(2, 1, 4, bug="FLAG_FIRST", finding=STALE),
    # Where each token has a message, its flag says what the word of the beginning does.
    Case(2, 1, 4, bug="NO_BEGIN"),
    Case(2, 1, 4, some_tokens=True, bug="NO_BEGIN", finding=STALE),
    Case(2, 1, 4, bug="ANY_EPOCH", finding=STALE),
    Case(2, 1, 4, crashes=1, bug="NO_DEADLINE", finding=STUCK),
    Case(2, 1, 4, timeouts=1, bug="SENDS_TO_MASKED", finding=STALE),
    Case(3, 1, 4, timeouts=1, bug="SENDS_TO_MASKED", finding=STALE),
]


def check(case: Case) -> tuple[str, str]:
    """Return what is found, and how many states were looked at."""
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            return subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=SECONDS_MAX, check=True
            ).stdout

        run("spin", "-a", *case.macros(), str(MODEL))
        memory = 12_000 if case.full else 2_000
        options = ["-O2", "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={memory}"]
        run("cc", *options, "-o", "pan", "pan.c")
        output = run("./pan", f"-m{DEPTH_MAX}", "-w22")
    errors, states = RESULT.search(output), STATES.search(output)
    if errors is None or states is None:
        raise RuntimeError(f"{case}: the model checker said:\n{output}")
    for words, finding in FINDINGS.items():
        if words in output.replace("invalid end states", ""):
            return finding, states[1]
    if "not completed" in output:
        return "unfinished", states[1]
    return HOLDS if errors[1] == "0" else "another error", states[1]


def main(arguments: list[str]) -> int:
    """Check all cases."""
    for program in ("spin", "cc"):
        if shutil.which(program) is None:
            print(f"SKIPPED: no {program}")
            return SKIPPED
    wrong = 0
    for case in CASES:
        if case.full and "--full" not in arguments:
            continue
        finding, states = check(case)
        as_expected = finding == case.finding
        wrong += not as_expected
        expected = "" if as_expected else f", but it should be: {case.finding}"
        print(f"{case!s:70s}{states:>10s} states  {finding}{expected}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
