"""Check the models of rounds and of updates with spin: python check.py [--full].

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
from typing import ClassVar

MODELS = Path(__file__).parent
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
# Looks for one finding only, so that it does not matter which a search comes to first.
OPTIONS = {HOLDS: [], STALE: ["-E"], STUCK: ["-A"]}


@dataclass(frozen=True)
class Rounds:
    """The model of rounds, and what is to be found in it."""

    model: ClassVar[str] = "rounds.pml"
    ranks: int
    in_flight: int
    rounds: int
    crashes: int = 0
    timeouts: int = 0
    some_tokens: bool = False
    names_anew: bool = False
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
            + ["-DNAMES_ANEW"] * self.names_anew
            + ([f"-DBUG_{self.bug}"] if self.bug else [])
        )

    def __str__(self) -> str:
        tokens = "some tokens" if self.some_tokens else "all tokens"
        return (
            f"R={self.ranks} F={self.in_flight} N={self.rounds} crashes={self.crashes} "
            f"timeouts={'any' if self.names_anew else self.timeouts} {tokens} {self.bug}"
        )


@dataclass(frozen=True)
class Update:
    """The model of updates, and what is to be found in it."""

    model: ClassVar[str] = "update.pml"
    ranks: int
    before: int
    after: int
    updates: int = 1
    in_flight: int = 1
    replacements: int = 0
    safe: int = 0
    crashes: int = 0
    stops: int = 0
    faults: int = 0
    timeouts: int = 0
    agreement: str = ""  # how members agree, beyond what the counts say: macros
    bug: str = ""
    finding: str = HOLDS
    full: bool = False

    def counts(self) -> dict[str, int]:
        """Return how many of what the model has."""
        return {
            "replacements": self.replacements,
            "safe": self.safe,
            "crashes": self.crashes,
            "stops": self.stops,
            "faults": self.faults,
            "timeouts": self.timeouts,
        }

    def macros(self) -> list[str]:
        """Return what the model is made with."""
        macros = {
            "R": self.ranks,
            "F": self.in_flight,
            "BEFORE": self.before,
            "AFTER": self.after,
            "UPDATES": self.updates,
        } | {name.upper(): count for name, count in self.counts().items()}
        flags = [f"-D{name}={value}" for name, value in macros.items()]
        flags += [f"-D{name}" for name in self.agreement.split()]
        return flags + ([f"-DBUG_{self.bug}"] if self.bug else [])

    def __str__(self) -> str:
        counts = [f"{name}={count}" for name, count in self.counts().items() if count > 0]
        rounds = "+".join(str(n) for n in [self.before] + [self.after] * self.updates)
        words = [f"R={self.ranks} F={self.in_flight} N={rounds}", *counts, self.agreement, self.bug]
        return " ".join(word for word in words if word)


Case = Rounds | Update

ROUNDS = [
    Rounds(2, 1, 5, crashes=1, timeouts=2),
    Rounds(2, 2, 6, crashes=1, timeouts=1),
    Rounds(2, 1, 4, some_tokens=True),
    Rounds(2, 1, 3, crashes=1, timeouts=1, some_tokens=True),
    Rounds(2, 2, 5, some_tokens=True, full=True),
    Rounds(2, 1, 4, crashes=1, timeouts=1, some_tokens=True, full=True),
    Rounds(3, 1, 4),
    Rounds(3, 1, 3, timeouts=1),
    Rounds(3, 1, 3, crashes=1, timeouts=1, full=True),
    Rounds(3, 1, 4, crashes=1, timeouts=1, full=True),
    Rounds(2, 1, 4, bug="FEW_SLOTS", finding=STUCK),
    Rounds(2, 2, 6, bug="FEW_SLOTS", finding=STUCK),
    Rounds(2, 1, 4, bug="WIDE_WINDOW", finding=STUCK),
    Rounds(2, 2, 6, bug="WIDE_WINDOW", finding=STUCK),
    Rounds(2, 1, 4, bug="FLAG_FIRST", finding=STALE),
    # Where each token has a message, its flag says what the word of the beginning does.
    Rounds(2, 1, 4, bug="NO_BEGIN"),
    Rounds(2, 1, 4, some_tokens=True, bug="NO_BEGIN", finding=STALE),
    Rounds(2, 1, 4, bug="ANY_EPOCH", finding=STALE),
    Rounds(2, 1, 4, crashes=1, bug="NO_DEADLINE", finding=STUCK),
    Rounds(2, 1, 4, timeouts=1, bug="SENDS_TO_MASKED", finding=STALE),
    Rounds(3, 1, 4, timeouts=1, bug="SENDS_TO_MASKED", finding=STALE),
    # A caller names all ranks anew in each round.
    Rounds(2, 1, 6, names_anew=True),
    Rounds(2, 2, 6, names_anew=True),
    Rounds(2, 2, 9, names_anew=True, full=True),
    Rounds(2, 1, 3, crashes=1, names_anew=True, some_tokens=True),
    Rounds(2, 1, 4, crashes=1, names_anew=True, some_tokens=True, full=True),
    Rounds(2, 1, 4, names_anew=True, bug="STORES_BLINDLY", finding=STALE),
    Rounds(2, 2, 6, names_anew=True, bug="STORES_BLINDLY", finding=STALE),
    Rounds(2, 1, 4, names_anew=True, bug="STORES_EARLY", finding=STALE),
    Rounds(2, 2, 6, names_anew=True, bug="STORES_EARLY", finding=STALE),
]


UPDATES = [
    Update(2, 1, 2, replacements=1, crashes=1, stops=1, faults=1, timeouts=1),
    Update(2, 1, 2, updates=2, replacements=2, crashes=2),
    Update(2, 1, 2, updates=2, replacements=1, stops=1, full=True),
    Update(2, 2, 4, replacements=1, stops=1, full=True),
    Update(2, 2, 4, replacements=1, stops=1, timeouts=1, full=True),
    Update(2, 2, 3, in_flight=2, replacements=1, stops=1, full=True),
    Update(2, 1, 1, updates=2, replacements=2, stops=2, full=True),
    Update(3, 1, 1, faults=1),
    Update(3, 1, 1, replacements=1, crashes=1, faults=1),
    Update(3, 1, 1, replacements=1, safe=2, stops=1, full=True),
    Update(3, 1, 1, replacements=1, stops=1, full=True),
    Update(3, 1, 2, replacements=1, crashes=1, faults=1, full=True),
    Update(3, 1, 1, replacements=1, crashes=1, timeouts=1, full=True),
    Update(3, 1, 2, replacements=1, stops=1, full=True),
    Update(3, 1, 1, updates=2, replacements=1, safe=2, stops=1, full=True),
    # The hub answers one by one. If it is lost between two answers, or one comes too late, some go
    # on in new windows and some in old ones; as long as it answers in time, that does not happen.
    Update(3, 1, 1, crashes=1, agreement="STAR", finding=STUCK),
    Update(3, 1, 1, timeouts=1, agreement="STAR", finding=STUCK),
    Update(3, 1, 1, safe=1, stops=1, agreement="STAR", full=True),
    Update(3, 1, 1, safe=1, stops=1, faults=1, agreement="STAR", full=True),
    Update(3, 1, 1, safe=1, crashes=1, agreement="STAR", bug="FAILS_UNHEARD", finding=STUCK),
    # If it may happen, nobody reads what is stale or waits for ever, and the next update mends it.
    Update(3, 1, 1, updates=2, crashes=1, agreement="STAR MAY_SPLIT"),
    Update(2, 1, 1, replacements=1, crashes=1, stops=1, timeouts=1, agreement="STAR MAY_SPLIT"),
    Update(3, 1, 1, updates=2, replacements=1, crashes=1, agreement="STAR MAY_SPLIT", full=True),
    Update(2, 1, 2, updates=2, replacements=1, stops=1, agreement="STAR", full=True),
    Update(3, 1, 1, replacements=1, stops=1, agreement="STAR MAY_SPLIT", full=True),
    # It cannot happen where all members have a word in common.
    Update(3, 1, 1, timeouts=1, agreement="STAR ONE_WORD", full=True),
    Update(3, 1, 1, crashes=1, timeouts=1, agreement="STAR ONE_WORD", full=True),
    Update(3, 1, 1, replacements=1, stops=1, agreement="STAR ONE_WORD", full=True),
    Update(2, 1, 2, replacements=1, stops=1, bug="OLD_WINDOWS", finding=STALE),
    Update(2, 1, 1, updates=2, replacements=1, stops=1, bug="REUSES_OLD", finding=STALE),
    Update(2, 1, 2, 2, replacements=1, stops=1, agreement="STAR", bug="REUSES_NEW", finding=STALE),
    Update(2, 1, 2, replacements=1, stops=1, bug="OWN_EPOCHS", finding=STUCK),
    # Nothing in a new window is of any epoch, so all that counts here is that it is the same one.
    Update(2, 1, 2, replacements=1, stops=1, bug="RESTARTS"),
    Update(2, 1, 2, faults=1, bug="NO_LAST", finding=STUCK),
    Update(2, 1, 2, bug="IN_FLIGHT", finding=STUCK),
    Update(2, 1, 2, bug="CLEARS_LATE", finding=STUCK),
    Update(2, 1, 2, replacements=1, stops=1, bug="KEEPS_MASKS", finding=STUCK),
    Update(2, 2, 2, replacements=1, stops=1, faults=1, bug="UNMASKS_EARLY", finding=STALE),
    Update(3, 2, 1, stops=1, timeouts=1, bug="OTHERS_ACTIVE", finding=STALE),
]


def check(case: Case) -> tuple[str, str]:
    """Return what is found, and how many states were looked at."""
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            return subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=SECONDS_MAX, check=True
            ).stdout

        run("spin", "-a", *case.macros(), str(MODELS / case.model))
        memory, places = (8_000, 26) if case.full else (2_000, 22)
        options = ["-O1", "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={memory}"]
        run("cc", *options, "-o", "pan", "pan.c")
        output = run("./pan", f"-m{DEPTH_MAX}", f"-w{places}", *OPTIONS[case.finding])
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
    cases: list[Case] = [*ROUNDS, *UPDATES]
    for case in cases:
        if case.full and "--full" not in arguments:
            continue
        finding, states = check(case)
        as_expected = finding == case.finding
        wrong += not as_expected
        expected = "" if as_expected else f", but it should be: {case.finding}"
        print(f"{case!s:74s}{states:>10s} states  {finding}{expected}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
