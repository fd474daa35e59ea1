"""Every test that takes `impl` runs on each of the PyTorch backends."""

import pytest
from cases import IMPLEMENTATIONS


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    return IMPLEMENTATIONS[request.param]
