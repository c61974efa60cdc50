"""The sub-commands of `vcppo` that start, watch and end runs: add_parser(subparsers) and run(args) -> exit code."""
