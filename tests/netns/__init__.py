"""Tests on real kernels, in network namespaces."""

import pytest

pytest.register_assert_rewrite(
    "tests.netns.observe", "tests.netns.sockets", "tests.netns.nat_support"
)
