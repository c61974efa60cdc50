"""One file per section of the configuration: each key with its type, allowed range, default and text.

A key's docstring (the string below it) is what ``vcppo config --explain`` prints. Defaults live only here.
"""
