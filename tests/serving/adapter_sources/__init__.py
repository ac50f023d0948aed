"""Tests of adapters that registries hold."""
