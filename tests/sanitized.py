"""A plugin of pytest: kernels are built to notice every read and write beyond what is theirs (AddressSanitizer)."""

from foretoken import kernels

kernels.FLAGS = (*(flag for flag in kernels.FLAGS if flag != "-O3"), "-O1", "-fsanitize=address")
