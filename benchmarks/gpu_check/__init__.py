"""Does the GPU path do what it should, and what does it cost? README.md tells how to run it."""
