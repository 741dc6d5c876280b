"""transformers is imported by two threads at once."""

import subprocess
import sys

from tests.conftest import environment

_PROGRAM = """
import threading, time
from megatron_qwen.hf import library
first = threading.Thread(target=library.transformers)
first.start()
while "transformers.utils" not in __import__("sys").modules:
    time.sleep(0.001)
assert first.is_alive()
library.transformers().AutoConfig
"""


def test_both_threads_get_all_of_it():
    # Not with the interpreter's own path: tests fork a warm one, which has imported it.
    subprocess.run([sys.executable, "-c", _PROGRAM], env=environment(), check=True, timeout=120)
