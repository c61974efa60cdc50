"""The sub-commands of `vcppo` that run in this process: add_parser(subparsers) and run(args) -> exit code."""
