"""What several test files share: a small pair of scans, weights for it, and how hypothesis draws."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from algorithm.cascade.network import Cascade, CascadeSettings
from algorithm.cascade.weights import save_cascade
from phantom.__main__ import write_pair
from phantom.pair import PhantomPair, PhantomSettings, chest_grid, make_pair

# How long a draw takes says nothing of the code under test, and is not the same on two machines.
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "same", settings.get_profile("explore"), max_examples=100, derandomize=True, database=None, print_blob=False
)
settings.load_profile("same")

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # threads beyond the processors wait for each other
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On tensors as small as most of these, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def as_nobody(tmp_path: Path) -> Callable[[], AbstractContextManager[None]]:
    """In its body the process may not do everything even when root runs the tests."""

    @contextmanager
    def body() -> Iterator[None]:
        user = os.geteuid()
        for folder in (tmp_path, *tmp_path.parents):
            if not folder.stat().st_mode & 0o001:  # pytest's own are closed to others
                folder.chmod(0o755)
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)

    return body


@pytest.fixture(scope="session")
def example_pair() -> PhantomPair:
    """A chest of 8 mm voxels; the two scans differ in their grids."""
    return make_pair(PhantomSettings(fixed_grid=chest_grid((36, 30, 34)), moving_grid=chest_grid((34, 32, 36))))


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory, example_pair: PhantomPair) -> Path:
    """The folder of that pair."""
    folder = tmp_path_factory.mktemp("example")
    write_pair(folder, example_pair)
    return folder


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained cascade whose displacements are of some mm, without foldings."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cascade = Cascade(CascadeSettings(features=(4, 8, 16), network_size=(32, 32, 32)))
    with torch.no_grad():
        for level in cascade.levels:
            level.last.weight.mul_(10)
    save_cascade(folder, cascade, {"data": "none"})
    return folder
