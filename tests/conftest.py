"""What several tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden figures and data beside the checkout; tests that need it skip where it is not."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder `shared` beside the checkout is not there")
    return folder
