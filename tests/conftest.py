"""Every test that takes `backend` runs on each. Hypothesis draws new inputs each time and prints how to repeat them."""

import pytest
from hypothesis import settings

settings.register_profile("tcm_fused", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("tcm_fused")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes a minute or more; leave out with -m 'not slow'")


@pytest.fixture(scope="session", params=["cpu", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that runs on CPU tensors."""
    name: str = request.param
    return name
