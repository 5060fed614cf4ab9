"""Measurements that take long: each has a target of the Makefile, none runs with the tests."""
