"""All metadata is in pyproject.toml; this file is where the compiled module will be declared."""

from setuptools import setup

setup()
