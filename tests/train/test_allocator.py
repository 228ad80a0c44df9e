"""Freed memory is used again, not mapped anew."""

import subprocess
import sys

import pytest

# Minor page faults of writing 64 MB ten times over, freed in between; then with the setting on.
SCRIPT = """
import resource, torch
from openelm.train.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
mapped = faults()
assert keep_freed_memory()
faults()  # the heap grows to what is needed
print(mapped, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc's")
def test_a_freed_tensor_of_64_mb_costs_no_second_page_fault() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    mapped, kept = map(int, out.split())
    # Ten times 64 MB in pages of 4 kB, against nothing but the interpreter's own.
    assert mapped > 100_000
    assert kept < 1_000
