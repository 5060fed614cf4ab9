"""All applications at once, for as long as one likes: `make soak`, or `python -m tests.soak`."""
