"""pytest's marker `twotower_op`: a test that returns a kernel, which is then checked.

    pytest_plugins = ["twotower_kernels.testing.pytest_plugin"]  # in conftest.py

    @pytest.mark.twotower_op("rms_norm", examples=100)
    def test_my_norm():
        return my_norm

The marker takes what `testing.check` takes; the test may have parameters and fixtures as any other.
"""

from __future__ import annotations

import pytest

from twotower_kernels.testing.checking import check

MARKER = "twotower_op(op, *, device='cpu', dtypes=None, examples=200, seed=0): checks the kernel that the test returns"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a marked test and checks what it returns."""
    marker = pyfuncitem.get_closest_marker("twotower_op")
    if marker is None:
        return None
    if len(marker.args) != 1:
        pytest.fail(f"twotower_op: expected the name of an op, then options by name, got {marker.args}", pytrace=False)
    given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    kernel = pyfuncitem.obj(**given)
    if not callable(kernel):
        pytest.fail(f"twotower_op: expected the test to return a kernel, got {kernel!r}", pytrace=False)
    (op,) = marker.args
    report = check(op, kernel, **marker.kwargs)
    pyfuncitem.user_properties.append(("twotower_op", report.to_json()))
    if not report:
        pytest.fail(str(report), pytrace=False)
    return True
