"""Checks and measurements of the GPU path; README.md describes how to run them."""
