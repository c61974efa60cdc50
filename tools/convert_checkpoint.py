#!/usr/bin/env python3
"""``tools/convert_checkpoint.py import|export …`` is ``vcppo convert import|export …``."""

import sys

from megatron_vcppo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
