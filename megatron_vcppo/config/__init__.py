"""Typed configuration: dataclasses hold every default, YAML and dotlist only override. Imports no torch."""

from megatron_vcppo.config.schema import Config

__all__ = ["Config"]
