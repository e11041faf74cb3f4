"""Tests that run Triton kernels in its interpreter, on CPU tensors.

Triton decides when it is imported whether its kernels are compiled or interpreted, for the whole process. So these
files are collected only where TRITON_INTERPRET=1 is set: tests/smart_kernels/test_interpreted.py runs them in a process
of their own, and so can you.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
