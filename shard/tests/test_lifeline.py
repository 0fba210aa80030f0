"""A child of the launcher ends with it, and with it alone."""

import os
import subprocess
import sys

CHILD = "from bros_shard.lifeline import die_with_parent; die_with_parent(); print('lives')"


def run_child(parent_pid: int | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "BROS_PARENT_PID"}
    if parent_pid is not None:
        environment["BROS_PARENT_PID"] = str(parent_pid)
    return subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=60)


def test_process_started_by_hand_is_left_alone():
    assert run_child(None).stdout == "lives\n"


def test_child_of_a_living_launcher_goes_on():
    assert run_child(os.getpid()).stdout == "lives\n"


def test_child_whose_launcher_died_before_it_could_ask_ends_at_once():
    child = run_child(os.getppid())  # not its parent: as if it had been adopted
    assert (child.returncode, child.stdout) == (0, "")


def test_asking_loads_no_torch():
    code = "import bros_shard.lifeline, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
