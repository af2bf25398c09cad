"""Facts about the Linux kernel that lingerx is built on, tried on the kernel that runs the tests.

Nothing here imports lingerx: a red test in this folder says that the kernel differs, not that the
library is wrong.
"""
